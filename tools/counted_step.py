"""One training step of the autoencoder with every byte counted, for tools/account_fsae_memory.py."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_fsvideo.config import (
    AlignmentConfig,
    FSAEJob,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss, VGG16Trunk
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.models.parameter_rules import ParameterRules
from megatron_fsvideo.tasks.fsae.learner import FSAELearner, MicroBatch
from megatron_fsvideo.tasks.fsae.patches import draw_patch
from megatron_fsvideo.training.network import TrainedNetwork

GB = 1e9
ADAM_MOMENTS = 2


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of tensors that operators have made and that are not freed yet.

    Attributes:
        live, peak: bytes now, and the most since `part` was entered last.
        parts: per part (live bytes at its end, peak within it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.parts: dict[str, tuple[int, int]] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operator and count its new tensors."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context whose allocations are counted under `name`."""
        self.peak = self.live
        yield
        self.parts[name] = (self.live, self.peak)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class CountedNetwork(TrainedNetwork):
    """The memory of a network in training on one rank, without Megatron, which fake tensors and a fake group lack.

    Gradients stay where autograd leaves them: in training Megatron's buffers, which are as large, hold them.
    """

    def __init__(
        self,
        name: str,
        chunks: list[nn.Module],
        config: TransformerConfig,
        rules: ParameterRules,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        training: TrainingConfig,
        pgs: Any,
        record: dict[str, Any],
    ) -> None:
        self.name, self.pgs = name, pgs
        self.chunks = nn.ModuleList(chunks)
        sharers = pgs.dp_cp_size if parallel.use_distributed_optimizer else 1
        self._sizes = [-(-p.numel() // sharers) for p in self.chunks.parameters() if p.requires_grad]
        self.averages = [torch.zeros(size) for size in self._sizes] if optimizer.ema_decay else []
        self.moments: list[Tensor] = []

    def backward(self, loss: Tensor, weight: float, is_last: bool, *others: TrainedNetwork) -> None:
        """Leave the gradients in the parameters."""
        (loss * weight).backward()

    def make_moments(self) -> None:
        """Create AdamW's moments, as the first step does."""
        if not self.moments:
            self.moments = [torch.zeros(size) for size in self._sizes for _ in range(ADAM_MOMENTS)]


class CountedStep:
    """The autoencoder's training on one micro-batch, without files, videos and checkpoints.

    Args:
        job: the job; its perceptual trunk gets random weights.
        counter: records bytes by part.
        group: process group that shares the clip; None for one rank.
    """

    def __init__(self, job: FSAEJob, counter: ByteCounter, group: dist.ProcessGroup | None) -> None:
        self.job, self.counter, self.group = job, counter, group
        size = 1 if group is None else group.size()
        pgs = SimpleNamespace(device=torch.device("cpu"), cp_size=size, dp_cp_size=size)
        losses = replace(job.losses, perceptual_weight=0.0)
        silent = replace(job, losses=losses, alignment=AlignmentConfig(vf_weight=0.0))
        # torch cannot move a module of fake tensors, not even to its own device.
        with counter.part("weights and average"), patch.object(nn.Module, "to", lambda module, device: module):
            self.learner = FSAELearner(silent, pgs, CountedNetwork)
        with counter.part("perceptual network"):
            self.learner.objective.job = job
            if job.losses.perceptual_weight > 0:
                self.learner.objective.perceptual = PerceptualLoss(VGG16Trunk(), None, "random VGG16")

    def run(self, clip: Bucket) -> None:
        """Run forward, losses, backward, and the discriminator with R1. The first call also creates AdamW's moments."""
        size, learner = self.job.training.micro_batch_size, self.learner
        with self.counter.part("clip"):
            video = torch.zeros(size, 3, clip.num_frames, clip.height, clip.width)
        shards = None if self.group is None else FrameShards.of_clip(self.group, clip.num_frames)
        with unset_fake_temporarily():  # the place of a box needs real numbers
            box = draw_patch(learner.model, self.job, 0, video if shards is None else shards.of(video))
        batch = MicroBatch(video, 0, self.job.adversary.discriminator_warmup_iters, None, box, shards, 1.0, True)
        frozen = learner.adversary.network.frozen() if learner.adversary is not None else nullcontext()
        with frozen:
            with self.counter.part("forward pass"):
                passed = learner.run(batch)
            with self.counter.part("losses"):
                loss, _ = learner.losses(batch, passed)
            with self.counter.part("backward pass"):
                learner.fsae.backward(loss, 1.0, True)
        del loss
        if learner.adversary is not None:
            with self.counter.part("discriminator's passes"):
                learner.discriminate(replace(batch, iteration=0), passed, 1.0)
        del passed
        for network in learner.networks.values():
            network.make_moments()


def account(job: FSAEJob, clip: Bucket, *, fake: bool = True) -> dict[str, Any]:
    """Count the bytes of a step by part. With `fake` off the step uses real tensors, which fit at small sizes.

    Returns:
        peak_gb and the part of the peak; for each part the GB it leaves allocated and its own peak.
    """
    counter = ByteCounter()
    with (
        _fake_group(job.parallel.context_parallel_size) as group,
        FakeTensorMode() if fake else nullcontext(),
        counter,
    ):
        step = CountedStep(job, counter, group)
        step.run(clip)
        counter.parts = {name: value for name, value in counter.parts.items() if name not in _STEP_PARTS}
        with counter.part("gradients and optimizer state"):
            pass
        step.run(clip)
    part, (_, peak) = max(counter.parts.items(), key=lambda item: item[1][1])
    return {
        "peak_gb": round(peak / GB, 3),
        "peak_in": part,
        "peak_bytes": peak,
        "parts": {
            name: {"live_gb": round(live / GB, 3), "peak_gb": round(top / GB, 3)}
            for name, (live, top) in counter.parts.items()
        },
    }


_STEP_PARTS = ("clip", "forward pass", "losses", "backward pass", "discriminator's passes")


@contextmanager
def _fake_group(size: int) -> Iterator[dist.ProcessGroup | None]:
    """Context with a process group that sends nothing, in which this process is a rank in the middle."""
    if size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=size // 2, world_size=size, store=FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
