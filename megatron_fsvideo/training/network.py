"""One network in training: its sharded weights, optimizer, schedule, moving average and section of a checkpoint.

A job owns one to three such networks. Gradients are computed in one of two ways:

    network.accumulate(batches, forward_step)      Megatron's schedule: pipeline parallelism, virtual stages
    network.backward(loss, weight, is_last)        the plain loop: several networks learn from one micro-batch
    network.finish_gradients()

Both leave the gradients of the global batch on every rank. `step` uses and clears them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fsvideo.config import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_fsvideo.models.parameter_rules import ParameterRules
from megatron_fsvideo.optim.moving_average import MovingAverage
from megatron_fsvideo.optim.optimizer import build_optimizer, forget_moments, reload_masters, step_if_finite, wrap_ddp
from megatron_fsvideo.optim.schedule import learning_rate, set_learning_rates
from megatron_fsvideo.optim.state import load_optimizer_state, sharded_optimizer_state, sharded_weights
from megatron_fsvideo.parallel.groups import ProcessGroups, gather_objects
from megatron_fsvideo.parallel.schedule import finalize_gradients, run_schedule


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of one optimizer step.

    Attributes:
        grad_norm: norm of the global batch's gradient, before clipping.
        learning_rate: rate of this step by the schedule of `--lr`, without the multipliers of parameters.
        has_stepped: False if the loss or the norm was not finite, so that no weight changed.
    """

    grad_norm: float
    learning_rate: float
    has_stepped: bool


class TrainedNetwork:
    """A network in Megatron's DDP with its optimizer, schedule and moving average.

    Args:
        name: name of the network's section in checkpoints.
        chunks: the network on this rank: one module, or with virtual pipeline stages several. Weights that do not
            require a gradient now are never trained.
        config: Megatron's settings, of this network alone, because they hold the functions of its schedule.
        optimizer: settings of the optimizer, kept as `settings`.
        rules: how each parameter is trained, as the network declares it.
        record: JSON-able description for generation, conversion and other jobs: kind, model, settings.
    """

    def __init__(
        self,
        name: str,
        chunks: Sequence[nn.Module],
        config: TransformerConfig,
        rules: ParameterRules,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        training: TrainingConfig,
        pgs: ProcessGroups,
        record: dict[str, Any],
    ) -> None:
        self.name = name
        self.pgs = pgs
        self.chunks = nn.ModuleList(chunks)
        self.wrapped = wrap_ddp(list(chunks), config, parallel, pgs)
        self.optimizer = build_optimizer(self.wrapped, optimizer, rules, pgs)
        decay = optimizer.ema_decay
        self.average = MovingAverage(self.optimizer, sharded_weights(chunks), decay) if decay else None
        self._record = record
        self.settings, self._train_iters = optimizer, training.train_iters

    def count_parameters(self) -> tuple[int, int]:
        """Count all weights of the network over all ranks, and the trained weights; every rank calls this."""
        weights = {
            tensor.key: (prod(tensor.global_shape), tensor.data.requires_grad)
            for tensor in sharded_weights(self.chunks).values()
            if isinstance(tensor.data, nn.Parameter)
        }
        for others in gather_objects(weights, self.pgs.pp):
            weights |= others  # some weights are on several stages
        return sum(size for size, _ in weights.values()), sum(size for size, trained in weights.values() if trained)

    @property
    def model(self) -> nn.Module:
        """The network's only module; an error with virtual stages."""
        (chunk,) = self.chunks
        return chunk

    def accumulate(
        self, batches: list[Any], forward_step: Callable[..., Any], *, forward_only: bool = False
    ) -> list[dict[str, Tensor]]:
        """Run the forward and backward passes of an iteration in Megatron's schedule.

        Args:
            batches: this rank's micro-batches.
            forward_step: (iterator over batches, chunk) -> (output, function of the output that returns the loss and a
                dict), as Megatron's schedule takes it.

        Returns:
            the dicts of all micro-batches on the last pipeline stage; an empty list on other stages.
        """
        return run_schedule(forward_step, self.wrapped, batches, self.pgs, forward_only=forward_only)

    def backward(self, loss: Tensor, weight: float, is_last: bool, *others: "TrainedNetwork") -> None:
        """Add the gradients of one micro-batch.

        Args:
            loss: loss of this rank's samples; with context parallelism the loss of whole samples, equal on CP ranks.
            weight: share of the micro-batch in this rank's samples: 1 / number of micro-batches of equal size.
            is_last: whether `finish_gradients` follows; gradients are reduced over ranks only then.
            others: further networks that this backward pass reaches.
        """
        assert self.pgs.pp_size == 1, "pipeline stages need Megatron's schedule: accumulate"
        with ExitStack() as stack:
            if not is_last:
                for chunk in (chunk for network in (self, *others) for chunk in network.wrapped):
                    stack.enter_context(chunk.no_sync())
            # Megatron's DDP averages over DP and CP ranks, but the gradients of CP ranks are parts of one gradient.
            (loss * (weight * self.pgs.cp_size)).backward()

    def finish_gradients(self) -> None:
        """Reduce the gradients of `backward` over all ranks, as Megatron's schedule does at its end."""
        finalize_gradients(self.wrapped, self.pgs)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Context in which gradients pass through the network to its inputs, and its weights get none.

        The context must last until the end of the backward pass, because recomputation runs the forward pass again.
        """
        trained = [parameter for parameter in self.chunks.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def step(self, iteration: int, loss: float) -> StepOutcome:
        """Clip, step and average after `iteration` steps; change nothing if loss or norm is not finite on any rank."""
        settings, iterations = self.settings, self._train_iters
        set_learning_rates(self.optimizer.param_groups, iteration + 1, iterations, settings)
        rate = learning_rate(iteration + 1, iterations, settings, settings.lr, settings.min_lr)
        grad_norm, has_stepped = step_if_finite(self.optimizer, loss, self.pgs)
        if self.average is not None and has_stepped:
            self.average.update(iteration + 1)
        self.discard()
        return StepOutcome(grad_norm, rate, has_stepped)

    def discard(self) -> None:
        """Clear the gradients."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the network is in evaluation mode, with the averaged weights if there are any."""
        for chunk in self.wrapped:
            chunk.eval()
        try:
            with self.average.applied() if self.average is not None else nullcontext():
                yield
        finally:
            for chunk in self.wrapped:
                chunk.train()

    def restart(self) -> None:
        """Start anew from the present weights: clear the optimizer state, and set the average to the weights."""
        forget_moments(self.optimizer)
        if self.average is not None:
            self.average.restart()

    def record(self) -> dict[str, Any]:
        """Description of the network in a checkpoint's job.json.

        The keys are `kind`, `model`, `bf16`, `average`, `optimizer`; a DiT has `diffusion` and `codec` too.
        """
        optimizer = {"optimizer": self.settings.optimizer}
        return self._record | {"average": self.average is not None, "optimizer": optimizer}

    def section(self, *, with_optimizer: bool = True, with_average: bool = True) -> dict[str, Any]:
        """The network's section of a checkpoint: a nested dict of Megatron's sharded tensors, all keys by name.

        Args:
            with_average: include the moving average, if the network keeps one.
        """
        content: dict[str, Any] = {}
        if self.average is not None and with_average:
            content["ema"] = self.average.sharded_state(sharded_weights(self.chunks))
        if with_optimizer:
            content["optimizer"] = sharded_optimizer_state(self.optimizer, sharded_weights(self.chunks))
        content["model"] = prefixed(sharded_weights(self.chunks), "model.")
        return prefixed(content, f"{self.name}.")

    def load_section(self, content: dict[str, Any], *, with_optimizer: bool = True, with_average: bool = True) -> None:
        """Load the content that was read into `section(...)`; an average that was not read starts from the weights."""
        missing, unexpected = self.chunks.load_state_dict(content["model"], strict=False)
        assert not unexpected and all(name.endswith("_extra_state") for name in missing), (missing, unexpected)
        if with_optimizer:
            load_optimizer_state(self.optimizer, sharded_weights(self.chunks), content["optimizer"])
        else:
            reload_masters(self.optimizer)
        if self.average is not None and with_average:
            self.average.load_state(content["ema"])
        elif self.average is not None:
            self.average.restart()


def plain_config() -> TransformerConfig:
    """Megatron's settings for a network that is whole on every rank and has no Megatron modules."""
    return TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)


def prefixed(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Prepend `prefix` to the keys of the sharded tensors of a nested dict, in place."""

    def rename(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            leaf.key = prefix + leaf.key
        return leaf

    return dict_list_map_inplace(rename, content)
