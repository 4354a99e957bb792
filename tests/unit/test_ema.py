"""The moving average against its closed form, and the swap."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from megatron_fsvideo.config import OptimizerConfig, ParallelConfig
from megatron_fsvideo.models.parameter_rules import UNDECAYED
from megatron_fsvideo.optim.moving_average import MovingAverage
from megatron_fsvideo.optim.optimizer import build_optimizer, reload_masters, wrap_ddp
from megatron_fsvideo.optim.state import sharded_weights
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.network import plain_config
from tests.parallel.harness import run_workers


def with_average(decay: float, check: Callable, dtype: torch.dtype = torch.float32) -> None:
    """Run `check(model, set_weights, average)` on a linear layer whose weights are all 1."""

    def worker() -> None:
        pgs = groups.initialize(ParallelConfig())
        model = nn.Linear(3, 2).to(dtype)
        rules = dict.fromkeys(model.parameters(), UNDECAYED)
        optimizer = build_optimizer(
            wrap_ddp([model], plain_config(), ParallelConfig(), pgs), OptimizerConfig(), rules, pgs
        )

        def set_weights(value: float) -> None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(value)
            reload_masters(optimizer)

        set_weights(1.0)
        check(model, set_weights, MovingAverage(optimizer, sharded_weights([model]), decay))

    run_workers(worker, 1)


def test_closed_form_and_restart() -> None:
    def check(model: nn.Module, set_weights: Callable, average: MovingAverage) -> None:
        expected = 1.0
        for iteration in range(1, 20):
            set_weights(float(iteration))
            average.update(iteration)
            decay = min(0.5, (1 + iteration) / (10 + iteration))
            expected = decay * expected + (1 - decay) * iteration
            for values in average.weights.values():
                torch.testing.assert_close(values, torch.full_like(values, expected))
        average.restart()
        assert all(torch.equal(values, torch.full_like(values, 19.0)) for values in average.weights.values())

    with_average(0.5, check)


def test_average_of_bf16_weights_is_fp32() -> None:
    def check(model: nn.Module, set_weights: Callable, average: MovingAverage) -> None:
        set_weights(1.0078125)  # the next bf16 number
        average.update(10**6)
        # In bf16 the average could not move by a thousandth of one step.
        for values in average.weights.values():
            assert values.dtype == torch.float32
            assert values.flatten()[0].item() == pytest.approx(1 + 0.0078125 / 1000, abs=1e-7)

    with_average(0.999, check, torch.bfloat16)


def test_applied_swaps_in_place_and_restores_even_after_an_error() -> None:
    def check(model: nn.Module, set_weights: Callable, average: MovingAverage) -> None:
        set_weights(7.0)
        storage = model.weight.data_ptr()
        with pytest.raises(RuntimeError), average.applied():
            assert torch.equal(model.weight, torch.ones_like(model.weight))
            raise RuntimeError
        assert torch.equal(model.weight, torch.full_like(model.weight, 7.0)) and model.weight.data_ptr() == storage

    with_average(0.9, check)
