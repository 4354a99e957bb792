"""The autoencoder's task: phases 1 to 6 of its training on video files (paper section 2.2).

A run from scratch may begin with single frames (`image_warmup_iters`), which train all spatial weights at low cost. At
the first videos the temporal taps move (`begin_video`) and the optimizer starts anew. All random numbers depend on
(seed, sample number), so that a restarted run equals an uninterrupted one.
"""

import math
from pathlib import Path

import torch

from megatron_fsvideo.checkpoint.release import CONFIG_FILE, MODEL_FOLDER, WEIGHTS_FILE, save_fsae
from megatron_fsvideo.checkpoint.run_record import RunDescription
from megatron_fsvideo.checkpoint.sharded_state import ExtraFiles
from megatron_fsvideo.config import FSAEJob, to_dict
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.losses.latent_regularizers import LatentTransform, draw_transform
from megatron_fsvideo.models.fsae import begin_video
from megatron_fsvideo.models.fsae.frame_shards import FrameShards
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum, gather_objects
from megatron_fsvideo.tasks.fsae.batches import BatchPlan, FSAEBatches
from megatron_fsvideo.tasks.fsae.inheritance import inherit_autoencoder, inherit_discriminator
from megatron_fsvideo.tasks.fsae.learner import FSAELearner, MicroBatch
from megatron_fsvideo.tasks.fsae.patches import check_memory_flags, draw_patch
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.task import Task


class FSAETask(Task):
    """Training of an autoencoder on the clips of a job.

    Raises:
        ValueError: batches that do not divide, no videos, none held out although `eval_iters` is positive, or weights
            that a loss needs are missing.
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups) -> None:
        self.job, self.pgs = job, pgs
        check_memory_flags(job)
        self.batches = FSAEBatches(job, pgs.dp_size, pgs.cp_size)
        self.learner = FSAELearner(job, pgs)
        self.networks = self.learner.networks

    def train_step(self, state: TrainState) -> StepResult:
        """Do one optimizer step on images or on clips."""
        self._begin_video(state.iteration)
        plan = self.batches.plan(state.iteration)
        self.batches.expect(state.iteration, state.consumed_samples, self._place)
        transform = self._draw_transform(plan, state)
        samples = plan.part(state.consumed_samples, *self._place(plan))

        sums: dict[str, float] = {}
        broken: list[str] = []
        weight = plan.micro_batch_size / len(samples)
        for start in samples[:: plan.micro_batch_size]:
            video = self.batches.read(start, plan).to(self.pgs.device)
            shards = FrameShards.of_clip(self.pgs.cp, video.shape[2]) if plan.is_shared else None
            box = draw_patch(self.learner.model, self.job, start, video if shards is None else shards.of(video))
            is_last = start + plan.micro_batch_size == samples.stop
            parts = self.learner.learn(
                MicroBatch(video, start, state.iteration, transform, box, shards, weight=weight, is_last=is_last)
            )
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
            if not math.isfinite(parts["loss"]):
                broken.append(f"{start}-{start + plan.micro_batch_size - 1}")
        averaged = self._mean_over_ranks(list(sums.values()))
        metrics = dict(zip(sums, averaged, strict=True))
        metrics |= self.learner.step(state.iteration, self.learner.adversary_under(transform), sum(averaged))
        wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        skipped = f"{', '.join(wrong)}; {self._blame(broken, plan, state)}" if wrong else None
        return StepResult(metrics, plan.num_samples, skipped=skipped)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR and SSIM on held-out shots, over all frames and for the last frame."""
        valid_clips = self.batches.valid_clips
        assert valid_clips is not None, "checked when the job was made"
        sums = torch.zeros(4, dtype=torch.float64, device=self.pgs.device)
        with self.learner.fsae.averaged():
            for clip in valid_clips[self.pgs.dp_cp_rank :: self.pgs.dp_cp_size]:
                video = clip.unsqueeze(0).to(self.pgs.device)
                with self.learner.autocast():
                    reconstruction = self.learner.forward.reconstruct(video).float()
                psnr, similarity = psnr_per_frame(reconstruction, video)[0], ssim(reconstruction, video)[0]
                sums += torch.stack([psnr.mean(), psnr[-1], similarity, torch.ones_like(similarity)])
        psnr_sum, last_sum, ssim_sum, count = all_reduce_sum(sums, self.pgs.dp_cp).tolist()
        return {"psnr": psnr_sum / count, "psnr_last_frame": last_sum / count, "ssim": ssim_sum / count}

    def describe(self) -> RunDescription:
        """Describe the run; its phase may not change when the run continues."""
        fixed = {"phase": self.job.phase.phase}
        return RunDescription(to_dict(self.job), order=self.batches.sample_order(), fixed=fixed)

    def summary(self) -> list[str]:
        """Lines about shots, shapes and batches."""
        return self.batches.summary()

    def inherit(self, source: Path) -> None:
        """Initialize the networks from those of an earlier phase (`--init-from`)."""
        learner = self.learner
        fresh = inherit_autoencoder(source, learner.model)
        learner.fsae.restart()
        has_discriminator = learner.adversary is not None and inherit_discriminator(source, learner.adversary)
        if self.pgs.is_rank_zero:
            print(f"autoencoder from {source}; fresh tensors: {', '.join(fresh) or 'none'}", flush=True)
            if learner.adversary is not None:
                print(f"discriminator: {f'from {source}' if has_discriminator else 'fresh'}", flush=True)

    def extra_files(self) -> ExtraFiles | None:
        """Write the autoencoder with its averaged weights as a release folder `model`."""
        fsae = self.learner.fsae
        with fsae.averaged():
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in self.learner.model.state_dict().items()}

        def write(target: Path) -> list[str]:
            save_fsae(target / MODEL_FOLDER, self.learner.model, weights)
            return [f"{MODEL_FOLDER}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)]

        return ExtraFiles(sum(tensor.nbytes for tensor in weights.values()), write)

    def _begin_video(self, iteration: int) -> None:
        warmup = self.job.phase.image_warmup_iters
        if warmup and iteration == warmup:
            begin_video(self.learner.model)
            self.learner.fsae.restart()

    def _blame(self, broken: list[str], plan: BatchPlan, state: TrainState) -> str:
        """Name the clips whose loss was not finite, or the whole batch if there are none; every rank calls this."""
        ranges = [name for names in gather_objects(broken) for name in names]
        first = state.consumed_samples
        return f"clips {' '.join(ranges) or f'{first}-{first + plan.num_samples - 1}'} of shape {plan.bucket}"

    def _place(self, plan: BatchPlan) -> tuple[int, int]:
        """Return (number of this rank's part of the batch, number of parts)."""
        if plan.is_shared:
            return self.pgs.dp_rank, self.pgs.dp_size
        return self.pgs.dp_cp_rank, self.pgs.dp_cp_size

    def _draw_transform(self, plan: BatchPlan, state: TrainState) -> LatentTransform | None:
        """Draw one transform for the whole step, so that all ranks use the same."""
        if self.learner.rests(state.iteration):
            return None
        factor, seed = self.learner.model.spatial_factor, self.job.training.seed
        grid = (plan.bucket.height // factor, plan.bucket.width // factor)
        return draw_transform(self.job.alignment.latent_regularizer, seed, state.consumed_samples, grid)

    def _mean_over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.pgs.device)
        return (all_reduce_sum(total, self.pgs.dp_cp) / self.pgs.dp_cp_size).tolist()
