"""The moving average against its closed form, and the swap."""

import pytest
import torch
from torch import nn

from megatron_fsvideo.training.ema import EMA


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_closed_form():
    model = tiny_model()
    set_weights(model, 1.0)
    ema = EMA(model, decay=0.5)
    expected = 1.0
    for iteration in range(1, 20):
        set_weights(model, float(iteration))
        ema.update(iteration)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        expected = decay * expected + (1 - decay) * iteration
        for average in ema.weights.values():
            torch.testing.assert_close(average, torch.full_like(average, expected))


def test_average_of_bf16_weights_is_fp32():
    model = tiny_model(torch.bfloat16)
    set_weights(model, 1.0)
    ema = EMA(model, decay=0.999)
    set_weights(model, 1.0078125)  # the next bf16 number
    ema.update(10**6)
    # In bf16 the average could not move by a thousandth of one step.
    assert ema.weights["weight"].dtype == torch.float32
    assert ema.weights["weight"][0, 0].item() == pytest.approx(1 + 0.0078125 / 1000, abs=1e-7)


def test_applied_swaps_in_place_and_restores_even_after_an_error():
    model = tiny_model()
    ema = EMA(model, decay=0.9)
    trained = torch.full_like(model.weight, 7.0)
    set_weights(model, 7.0)
    storage = model.weight.data_ptr()
    with pytest.raises(RuntimeError), ema.applied():
        assert not torch.equal(model.weight, trained)
        torch.testing.assert_close(model.weight.data, ema.weights["weight"])
        raise RuntimeError
    assert torch.equal(model.weight, trained) and model.weight.data_ptr() == storage


def test_load_and_restart():
    model = tiny_model()
    ema = EMA(model, decay=0.9)
    ema.load({name: torch.full_like(value, 3.0) for name, value in ema.weights.items()})
    assert ema.weights["bias"].tolist() == [3.0, 3.0]
    ema.restart()
    assert torch.equal(ema.weights["weight"], model.weight)


def test_the_fp32_masters_are_averaged_and_the_parameters_swapped():
    model = tiny_model(torch.bfloat16)
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    ema = EMA(model, 0.5, masters)
    for master in masters.values():
        master.fill_(1.001)  # bf16 would say 1
    ema.restart()
    ema.update(10**6)
    assert ema.weights["weight"][0, 0].item() == pytest.approx(1.001, abs=1e-6)
    with ema.applied():
        assert model.weight[0, 0].item() == 1.0
