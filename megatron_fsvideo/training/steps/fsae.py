"""The autoencoder's step: phase 1 of its training (paper section 2.2.3), on one process or data-parallel.

A phase on single frames may come first (`image_warmup_iters`): it is cheap and settles everything spatial. Where it
ends, the temporal taps move (`begin_video`) and the optimizer starts anew. Everything random is a function of
(seed, sample number), so that a restarted run repeats an unbroken one.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megatron_fsvideo.checkpoint.distributed import (
    JOB_FILE,
    LATEST_FILE,
    iteration_folder,
    latest_iteration,
    read_record,
    remove_old_checkpoints,
    write_text_atomically,
)
from megatron_fsvideo.checkpoint.release import MODEL_FOLDER, save_fsae
from megatron_fsvideo.config import FSAEJob, differences, from_dict, to_dict
from megatron_fsvideo.data.clip_dataset import open_clips
from megatron_fsvideo.evaluation.perceptual import build_perceptual_loss
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.models.fsae import FSAE, begin_video
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum, barrier
from megatron_fsvideo.parallel.seeds import derive_seed, sample_generator
from megatron_fsvideo.training.ema import EMA
from megatron_fsvideo.training.fsae_optimizer import FSAEOptimizer
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.steps.fsae_objective import draw_latent_noise, latent_penalty, reconstruction_loss

TRAINING_FILE = "training.pt"


class FSAEStep:
    """Model, optimizer, moving average and clips of an autoencoder job.

    Raises:
        ValueError: batches that do not divide, no videos, or none held out although `eval_iters` is positive.
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups) -> None:
        self.job = job
        self.pgs = pgs
        self._check_batches()
        self.clips, held_out = open_clips(job.data, job.training.seed)
        self.valid_clips: Tensor | None = None
        if job.training.eval_iters > 0:
            if held_out is None:
                raise ValueError("eval_iters is positive, but no shot is held out: set holdout_every")
            count = job.training.eval_iters * job.training.global_batch_size
            self.valid_clips = held_out.fixed_clips(count, job.data.num_frames, job.data.valid_side)

        torch.manual_seed(derive_seed(job.training.seed, "fsae"))
        self.model = FSAE(job.model).to(pgs.device)
        self.wrapped: torch.nn.Module = self.model
        if pgs.dp_size > 1:
            self.wrapped = DistributedDataParallel(self.model, process_group=pgs.dp)
        self.optimizer = FSAEOptimizer(self.model, job.optimizer, job.training.train_iters)
        self.ema = EMA(self.model, job.optimizer.ema_decay) if job.optimizer.ema_decay else None
        self.perceptual = build_perceptual_loss(job.losses, pgs.device)

    def train_step(self, state: TrainState) -> StepResult:
        """One optimizer step on frames or on clips."""
        warmup = self.job.losses.image_warmup_iters
        if warmup and state.iteration == warmup:
            begin_video(self.model)
            self.optimizer.restart()
            if self.ema is not None:
                self.ema.restart()
        num_samples, micro_batch, num_frames = self._batch_shape(state.iteration)
        per_rank = num_samples // self.pgs.dp_size
        first = state.consumed_samples + self.pgs.dp_rank * per_rank

        sums: dict[str, float] = {}
        self.wrapped.train()
        for start in range(first, first + per_rank, micro_batch):
            is_last = start + micro_batch == first + per_rank
            with nullcontext() if is_last or self.pgs.dp_size == 1 else self.wrapped.no_sync():
                parts = self._forward_backward(start, micro_batch, num_frames, micro_batch / per_rank)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) * micro_batch / per_rank
        grad_norm, learning_rate = self.optimizer.step(state.iteration)
        if not math.isfinite(sums["loss"] + grad_norm):
            raise ValueError(
                f"iteration {state.iteration + 1}: the loss is {sums['loss']}, the gradient norm {grad_norm}; continue "
                "from the last checkpoint with a lower lr"
            )
        if self.ema is not None:
            self.ema.update(state.iteration + 1)
        averaged = self._mean_over_ranks(list(sums.values()))
        metrics = dict(zip(sums, averaged, strict=True)) | {"grad_norm": grad_norm, "learning_rate": learning_rate}
        return StepResult(metrics, num_samples, 0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR and SSIM on held-out shots, over all frames and for the last one."""
        assert self.valid_clips is not None, "checked when the job was made"
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.pgs.device)
        with self.ema.applied() if self.ema is not None else nullcontext():
            for clip in self.valid_clips[self.pgs.dp_rank :: self.pgs.dp_size]:
                video = clip.unsqueeze(0).to(self.pgs.device)
                with self._autocast():
                    reconstruction = self.model(video)[0].float()
                psnr, similarity = psnr_per_frame(reconstruction, video)[0], ssim(reconstruction, video)[0]
                sums += torch.stack([psnr.mean(), psnr[-1], similarity, torch.ones_like(similarity)])
        psnr_sum, last_sum, ssim_sum, count = all_reduce_sum(sums, self.pgs.dp).tolist()
        return {"psnr": psnr_sum / count, "psnr_last_frame": last_sum / count, "ssim": ssim_sum / count}

    def save(self, state: TrainState) -> None:
        """Write a checkpoint into `--save`: a release folder `model`, which others load, and what training needs."""
        if self.pgs.is_rank_zero:
            target = iteration_folder(Path(self.job.checkpoint.save), state.iteration)
            target.mkdir(parents=True, exist_ok=True)
            with self.ema.applied() if self.ema is not None else nullcontext():
                save_fsae(target / MODEL_FOLDER, self.model)
            content = {
                "iteration": state.iteration,
                "consumed_samples": state.consumed_samples,
                "weights": self.model.state_dict(),
                "ema": self.ema.weights if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(content, target / TRAINING_FILE)
            write_text_atomically(target / JOB_FILE, json.dumps({"job": to_dict(self.job)}, indent=1) + "\n")
            write_text_atomically(target.parent / LATEST_FILE, f"{state.iteration}\n")
            remove_old_checkpoints(target.parent, state.iteration, self.job.checkpoint.keep_checkpoints)
        barrier()

    def is_saving(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return False

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any."""

    def load(self) -> TrainState:
        """Continue from the newest checkpoint in `--load`; a fresh start without one.

        Raises:
            ValueError: the checkpoint is damaged or of another architecture.
        """
        folder = self.job.checkpoint.load
        iteration = latest_iteration(Path(folder)) if folder else None
        if iteration is None:
            return TrainState()
        source = iteration_folder(Path(folder), iteration)
        saved = from_dict(FSAEJob, read_record(Path(folder), iteration)["job"])
        if wrong := differences(saved.model, self.job.model):
            raise ValueError(f"the checkpoint {source} has another architecture: {'; '.join(wrong)}")
        content = torch.load(source / TRAINING_FILE, map_location=self.pgs.device, weights_only=True)
        self.model.load_state_dict(content["weights"])
        if self.job.checkpoint.finetune:
            return TrainState()
        self.optimizer.load_state_dict(content["optimizer"])
        if self.ema is not None:
            self.ema.load(content["ema"] or content["weights"])
        return TrainState(content["iteration"], content["consumed_samples"])

    def _forward_backward(self, first: int, size: int, num_frames: int, weight: float) -> dict[str, Tensor]:
        """Gradients of one micro-batch are added, weighted; returns its loss and the loss's parts."""
        seed, strength = self.job.training.seed, self.job.losses.latent_noise
        video = self.clips.random_batch(first, size, num_frames, self.job.data.resolution).to(self.pgs.device)
        noise = None
        if strength > 0:
            side = video.shape[-1] // self.model.spatial_factor
            frames = (num_frames - 1) // self.model.temporal_factor + 1
            shape = (size, self.model.latent_channels, frames, side, side)
            noise = draw_latent_noise(seed, first, shape, strength).to(self.pgs.device)
        with self._autocast():
            reconstruction, latents = self.wrapped(video, noise)
        loss, parts = reconstruction_loss(reconstruction, video, self.job.losses, self.perceptual)
        if self.job.losses.latent_penalty > 0:
            loss = loss + self.job.losses.latent_penalty * latent_penalty(latents)
        (loss * weight).backward()
        return {"loss": loss.detach(), **parts}

    def _batch_shape(self, iteration: int) -> tuple[int, int, int]:
        """(samples over all ranks, samples per forward pass, frames) of the step after `iteration`."""
        training, losses = self.job.training, self.job.losses
        is_image = iteration < losses.image_warmup_iters
        if losses.image_fraction > 0 and not is_image:
            generator = sample_generator(training.seed, iteration, 0, "image_batch")
            is_image = float(torch.rand((), generator=generator)) < losses.image_fraction
        if is_image:
            return losses.image_batch_size, losses.image_batch_size // self.pgs.dp_size, 1
        return training.global_batch_size, training.micro_batch_size, self.job.data.num_frames

    def _check_batches(self) -> None:
        training, dp_size = self.job.training, self.pgs.dp_size
        if training.global_batch_size % (training.micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} x {dp_size} processes"
            )
        if self.job.losses.image_batch_size % dp_size:
            raise ValueError(
                f"image_batch_size {self.job.losses.image_batch_size} is not a multiple of the {dp_size} processes"
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.pgs.device.type, torch.bfloat16, enabled=self.job.training.bf16)

    def _mean_over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.pgs.device)
        return (all_reduce_sum(total, self.pgs.dp) / self.pgs.dp_size).tolist()
