"""The autoencoder's optimizer: AdamW on everything, or Muon on dense kernels and AdamW on the rest; one schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fsvideo.config import OptimizerConfig
from megatron_fsvideo.models.fsae.convolutions import VideoConv3d
from megatron_fsvideo.optim.matrix_exchange import deal_out
from megatron_fsvideo.optim.schedule import learning_rate
from megatron_fsvideo.parallel.groups import broadcast_tensor, gather_objects
from megatron_fsvideo.training.muon import Muon

MUON_MOMENTUM = 0.95


class FSAEOptimizer:
    """Clips the gradients, sets the learning rates, steps, clears the gradients. Frozen parameters are left out.

    Args:
        train_iters: length of the schedule.
        sharers: processes with the same weights and gradients that share the moments out; None keeps all.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, train_iters: int, sharers: ProcessGroup | None = None
    ) -> None:
        self.config = config
        self.train_iters = train_iters
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._sharers = sharers
        self._owners = {} if sharers is None else deal_out(self.parameters, sharers.size())
        dense = dense_kernels(model)
        taken = {id(p) for p in dense}
        others = {"params": [p for p in self.parameters if id(p) not in taken], "weight_decay": 0.0}
        adam_groups = [others]
        if config.optimizer == "adam":
            adam_groups.append({"params": dense, "weight_decay": config.weight_decay})
        betas = (config.adam_beta1, config.adam_beta2)
        adam = torch.optim.AdamW(adam_groups, config.lr, betas=betas, eps=config.adam_eps)
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adam, config.lr)]
        if config.optimizer == "muon":
            muon = Muon(dense, config.muon_lr, MUON_MOMENTUM, config.weight_decay)
            self._optimizers.append((muon, config.muon_lr))

    def step(self, iteration: int) -> tuple[float, float]:
        """The update after `iteration` steps; returns the gradient norm before clipping and AdamW's rate.

        With a norm that is not finite nothing moves.
        """
        limit = self.config.clip_grad or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        floor = self.config.min_lr / self.config.lr
        factor = learning_rate(iteration + 1, self.train_iters, self.config, 1.0, floor)
        for parameter in self.parameters:
            if not self._is_own(parameter):
                parameter.grad = None  # the optimizers leave it and make no moments for it
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * peak
            if math.isfinite(grad_norm):
                optimizer.step()
        if self._sharers is not None and math.isfinite(grad_norm):
            for parameter in self.parameters:
                broadcast_tensor(parameter.data, self._sharers, self._owners[parameter])
        self.discard()
        return grad_norm, factor * self.config.lr

    def discard(self) -> None:
        """Clear the gradients."""
        for optimizer, _ in self._optimizers:
            optimizer.zero_grad()

    def restart(self) -> None:
        """Forget all momentum: the weights have just been moved."""
        for optimizer, _ in self._optimizers:
            optimizer.state.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """Everything to continue with, on any number of processes; all that share it call this."""
        states = [optimizer.state_dict() for optimizer, _ in self._optimizers]
        if self._sharers is not None:
            for (optimizer, _), state in zip(self._optimizers, states, strict=True):
                state["state"] = self._whole_state(optimizer)
        return states

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: saved by another kind of optimizer.
        """
        if len(states) != len(self._optimizers):
            raise ValueError(
                f"the checkpoint's optimizer state is not of optimizer {self.config.optimizer}; --finetune loads the "
                "weights alone"
            )
        for (optimizer, _), state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
            for parameter in [p for p in optimizer.state if not self._is_own(p)]:
                del optimizer.state[parameter]

    def _is_own(self, parameter: nn.Parameter) -> bool:
        return self._sharers is None or self._owners[parameter] == self._sharers.rank()

    def _whole_state(self, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state with all processes' parts, by the number of the parameter."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        # Step counts are single numbers; moments are as large as the weights.
        own = {
            numbers[parameter]: {name: None if value.ndim else value.cpu() for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        whole: dict[int, dict[str, Tensor]] = {}
        for owner, outline in enumerate(gather_objects(own, self._sharers)):
            for number, entries in outline.items():
                parameter = parameters[number]
                whole[number] = dict(entries)
                for name in (name for name, value in entries.items() if value is None):
                    is_here = owner == self._sharers.rank()
                    moment = optimizer.state[parameter][name] if is_here else torch.empty_like(parameter)
                    whole[number][name] = broadcast_tensor(moment, self._sharers, owner).detach().cpu()
        return whole


def dense_kernels(model: nn.Module) -> list[nn.Parameter]:
    """Trained kernels of ungrouped convolutions: what Muon updates and weight decay reaches. Grouped: no matrix."""
    convolutions = (VideoConv3d, nn.Conv2d, nn.Conv3d)
    found = [m.weight for m in model.modules() if isinstance(m, convolutions) and m.groups == 1]
    return [weight for weight in found if weight.requires_grad]
