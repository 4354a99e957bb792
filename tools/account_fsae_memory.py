"""Count the memory of one training step of the autoencoder at any size, without a device that has it.

    python tools/account_fsae_memory.py --preset fsae_phase3 --clip 121x1024x1024 --out memory.json

The step's own code runs on fake tensors, which have sizes and no data, as one rank in the middle of those that share a
clip; every byte that torch's operators allocate is counted until it is freed. Not counted: the workspaces of
convolution libraries, fragmentation, the CUDA context, DINOv2 (phase 4). The gradients are those of the second step of
two, so that everything that stays from step to step is there. Flags are those of pretrain_fsae.py.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_fsvideo.config import FSAE_PRESETS, AlignmentConfig, FSAEJob, parse_job, run_script, to_dict
from megatron_fsvideo.config.rules import Checked, PathText, Positive
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.outputs import check_outputs, write_json
from megatron_fsvideo.evaluation.perceptual import PerceptualLoss, VGG16Trunk
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.optim.matrix_exchange import deal_out
from megatron_fsvideo.training.ema import EMA
from megatron_fsvideo.training.fsae_adversary import Adversary
from megatron_fsvideo.training.steps.fsae_objective import FSAEObjective, whole_reconstruction
from megatron_fsvideo.training.steps.fsae_shares import ClipShare, draw_patch, whole_region
from megatron_fsvideo.training.steps.fsae_trainee import FSAETrainee

GB = 1e9
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class AccountFlags(Checked):
    """what to count"""

    clip: PathText = "121x1024x1024"
    """Shape of the clips, frames x height x width."""
    out: PathText | None = None
    """JSON file to write."""
    overwrite: bool = False
    """Replace the JSON file of an earlier run."""
    limit_gb: Positive = 80.0
    """Memory of a device in GB (10^9 bytes). The exit code is 1 if the step does not fit."""


@dataclass(frozen=True)
class AccountJob(FSAEJob):
    """Count the memory of one training step of the autoencoder."""

    account: AccountFlags = field(default_factory=AccountFlags)


class ByteCounter(TorchDispatchMode):
    """Bytes of the tensors that operators have made and nobody has freed yet.

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
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens within is called `name`."""
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


class CountedStep:
    """What `FSAEStep` does with one micro-batch, without files, videos and checkpoints.

    Args:
        job: whose perceptual trunk gets random weights.
        counter: notes the parts.
        group: ranks that share the clip; None for one rank.
    """

    def __init__(self, job: FSAEJob, counter: ByteCounter, group: dist.ProcessGroup | None) -> None:
        self.job, self.counter, self.group = job, counter, group
        losses, memory, device = job.losses, job.memory, torch.device("cpu")
        with counter.part("weights"):
            self.fsae = FSAE(job.model)
        recomputes = job.parallel.recompute_granularity == "full"
        self.fsae.recompute(recomputes, outer_encoder=not memory.encoder_tile)
        self.trainee = FSAETrainee(
            self.fsae, job.phase.trains_encoder, tile=memory.encoder_tile, slice_latents=memory.encoder_slice
        )
        with counter.part("moving average"):
            self.ema = EMA(self.fsae, job.optimizer.ema_decay) if job.optimizer.ema_decay else None
        self.moments: list[Tensor] = []
        with counter.part("discriminator"):
            one = SimpleNamespace(device=device, dp_cp=None, dp_cp_size=1)
            # torch cannot move a module of fake tensors, not even to where it is.
            with patch.object(Discriminator, "to", lambda network, device: network):
                self.adversary = Adversary(job, one) if job.uses_gan else None
        silent = replace(job, losses=replace(losses, perceptual_weight=0.0), alignment=AlignmentConfig(vf_weight=0.0))
        with counter.part("perceptual network"):
            self.objective = FSAEObjective(silent, device)
            self.objective.job = job
            if losses.perceptual_weight > 0:
                self.objective.perceptual = PerceptualLoss(VGG16Trunk(), None, "random VGG16")

    def run(self, clip: Bucket) -> None:
        """Forward, losses, backward, discriminator with R1; the first time AdamW's moments are made after it."""
        size = self.job.training.micro_batch_size
        with self.counter.part("clip"):
            video = torch.zeros(size, 3, clip.num_frames, clip.height, clip.width)
        share = None if self.group is None else ClipShare(self.group, clip.num_frames)
        mine = video if share is None else share.of(video)
        with unset_fake_temporarily():  # a place has numbers
            box = draw_patch(self.fsae, self.job, 0, mine)
        del mine
        with self.counter.part("forward pass"):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.job.training.bf16):
                output = self.trainee(video, box=box, share=share)
        with self.counter.part("losses"):
            loss, _ = self.objective(output, video, self.fsae, adversary=self.adversary, share=share)
        with self.counter.part("backward pass"):
            loss.backward()
        del loss
        if self.adversary is not None:
            with self.counter.part("discriminator's passes"):
                with torch.no_grad():
                    fake = whole_reconstruction(output, share)
                real = video if output.region is None else whole_region(output.region, share).of(video)
                self.adversary.backward(real, fake, 0, 1.0)
            del fake, real
        del output
        if not self.moments:
            # Gradients stay too: in training their memory belongs to DistributedDataParallel.
            modules = [self.trainee] if self.adversary is None else [self.trainee, self.adversary.model]
            trained = [[p for p in module.parameters() if p.requires_grad] for module in modules]
            mine = [p for parameters in trained for p in self._shared_out(parameters)]
            self.moments = [torch.zeros_like(p) for p in mine for _ in range(ADAM_MOMENTS)]

    def _shared_out(self, parameters: list[Tensor]) -> list[Tensor]:
        """Those whose moments this rank keeps; more data-parallel ranks than share a clip would leave it fewer."""
        if self.group is None or not self.job.parallel.use_distributed_optimizer:
            return parameters
        owners = deal_out(parameters, self.group.size())
        return [parameter for parameter in parameters if owners[parameter] == self.group.rank()]


def account(job: FSAEJob, clip: Bucket, *, fake: bool = True) -> dict[str, Any]:
    """Bytes of a step by part; with `fake` off it is run for real, which small sizes allow.

    Returns:
        peak_gb and its part; and per part what it leaves allocated and its own peak, in GB.
    """
    group = _fake_group(job.parallel.context_parallel_size)
    counter = ByteCounter()
    with FakeTensorMode() if fake else nullcontext(), counter:
        step = CountedStep(job, counter, group)
        step.run(clip)
        counter.parts = {name: value for name, value in counter.parts.items() if name not in _STEP_PARTS}
        with counter.part("gradients and optimizer state"):
            pass
        step.run(clip)
    if group is not None:
        dist.destroy_process_group()
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


def _fake_group(size: int) -> dist.ProcessGroup | None:
    """A group that sends nothing, in which this is a rank in the middle."""
    if size == 1:
        return None
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=size // 2, world_size=size, store=FakeStore())
    return dist.group.WORLD


def main() -> None:
    """Parse, count, print, write."""
    job = parse_job(AccountJob, FSAE_PRESETS)
    flags = job.account
    check_outputs([flags.out] if flags.out else [], overwrite=flags.overwrite)
    report = account(job, Bucket.parse(flags.clip))
    settings = {
        "phase": job.phase.phase,
        "context_parallel_size": job.parallel.context_parallel_size,
        "recompute_granularity": job.parallel.recompute_granularity,
        **to_dict(job.memory),
        **to_dict(job.perceptual),
    }
    report = {"clip": flags.clip, **settings, **report}
    for name, values in report["parts"].items():
        print(f"{name:32} then allocated {values['live_gb']:8.2f} GB   at most {values['peak_gb']:8.2f} GB")
    print(f"peak {report['peak_gb']:.2f} GB of {flags.limit_gb:g} GB, in the {report['peak_in']}")
    if flags.out is not None:
        write_json(flags.out, report)
    if report["peak_gb"] > flags.limit_gb:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
