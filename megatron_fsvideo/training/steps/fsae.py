"""The autoencoder's step: phases 1 to 6 of its training (paper section 2.2), on one process or data-parallel.

    encode -> (noise, transform) -> decode -> losses -> backward -> the discriminator's losses -> backward -> both step

A run from scratch may begin with single frames (`image_warmup_iters`): they are cheap and settle everything spatial.
Where they end, the temporal taps move (`begin_video`) and the optimizer starts anew. Everything random is a function of
(seed, sample number), so that a restarted run repeats an unbroken one.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megatron_fsvideo.checkpoint.distributed import newest_good_checkpoint
from megatron_fsvideo.checkpoint.starting_point import find_starting_point
from megatron_fsvideo.checkpoint.writer import CheckpointWriter
from megatron_fsvideo.config import FSAEConfig, FSAEJob, differences, from_dict, to_dict
from megatron_fsvideo.data.sample_order import check_order
from megatron_fsvideo.evaluation.psnr import psnr_per_frame
from megatron_fsvideo.evaluation.ssim import ssim
from megatron_fsvideo.losses.latent_regularizers import LatentTransform, draw_transform
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE, begin_video
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum, gather_objects
from megatron_fsvideo.parallel.seeds import derive_seed
from megatron_fsvideo.training.ema import EMA
from megatron_fsvideo.training.fsae_adversary import Adversary
from megatron_fsvideo.training.fsae_checkpoint import TRAINING_FILE, plan_fsae_checkpoint
from megatron_fsvideo.training.fsae_optimizer import FSAEOptimizer
from megatron_fsvideo.training.fsae_phases import inherit_autoencoder, inherit_discriminator
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.steps.fsae_batches import BatchPlan, FSAEBatches
from megatron_fsvideo.training.steps.fsae_objective import FSAEObjective, draw_latent_noise, whole_reconstruction
from megatron_fsvideo.training.steps.fsae_shares import ClipShare, check_memory_flags, draw_patch, whole_region
from megatron_fsvideo.training.steps.fsae_trainee import FSAETrainee


class FSAEStep:
    """Model, adversary, optimizers, moving average and clips of an autoencoder job.

    Raises:
        ValueError: batches that do not divide, no videos, none held out although `eval_iters` is positive, or weights
            that a loss needs are missing.
    """

    def __init__(self, job: FSAEJob, pgs: ProcessGroups) -> None:
        self.job = job
        self.pgs = pgs
        check_memory_flags(job)
        self.batches = FSAEBatches(job, pgs.dp_size, pgs.cp_size)
        self.objective = FSAEObjective(job, pgs.device)

        torch.manual_seed(derive_seed(job.training.seed, "fsae"))
        self.model = FSAE(job.model).to(pgs.device)
        recomputes = job.parallel.recompute_granularity == "full"
        self.model.recompute(recomputes, outer_encoder=not job.memory.encoder_tile)
        self.trainee = FSAETrainee(
            self.model,
            job.phase.trains_encoder,
            self._build_projection(),
            tile=job.memory.encoder_tile,
            slice_latents=job.memory.encoder_slice,
        )
        self.wrapped: torch.nn.Module = self.trainee
        if pgs.dp_cp_size > 1:
            self.wrapped = DistributedDataParallel(self.trainee, process_group=pgs.dp_cp, gradient_as_bucket_view=True)
        sharers = pgs.dp_cp if job.parallel.use_distributed_optimizer else None
        self.optimizer = FSAEOptimizer(self.trainee, job.optimizer, job.training.train_iters, sharers)
        self.adversary = Adversary(job, pgs) if job.uses_gan else None
        self.ema = EMA(self.model, job.optimizer.ema_decay) if job.optimizer.ema_decay else None
        checkpoint = job.checkpoint
        self.writer = (
            CheckpointWriter(Path(checkpoint.save), pgs, checkpoint.keep_checkpoints, checkpoint.async_save)
            if checkpoint.save
            else None
        )

    def train_step(self, state: TrainState) -> StepResult:
        """One optimizer step on images or on clips."""
        self._begin_video(state.iteration)
        plan = self.batches.plan(state.iteration)
        self.batches.expect(state.iteration, state.consumed_samples, self._place)
        transform = self._draw_transform(plan, state)
        # Transformed latents make videos of any size: the discriminator sees plain ones only.
        adversary = self.adversary if transform is None or transform.role == "added" else None
        rank, num_ranks = self._place(plan)
        per_rank = plan.num_samples // num_ranks
        first = state.consumed_samples + rank * per_rank

        sums: dict[str, float] = {}
        broken: list[str] = []
        self.wrapped.train()
        for start in range(first, first + per_rank, plan.micro_batch_size):
            is_last = start + plan.micro_batch_size == first + per_rank
            with nullcontext() if is_last or self.pgs.dp_cp_size == 1 else self.wrapped.no_sync():
                parts = self._micro_batch(start, plan, state.iteration, transform, adversary)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) * plan.micro_batch_size / per_rank
            if not math.isfinite(parts["loss"]):
                broken.append(f"{start}-{start + plan.micro_batch_size - 1}")
        averaged = self._mean_over_ranks(list(sums.values()))
        metrics = dict(zip(sums, averaged, strict=True))
        metrics |= self._update(state.iteration, adversary, all(map(math.isfinite, averaged)))
        wrong = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        skipped = f"{', '.join(wrong)}; {self._blame(broken, plan, state)}" if wrong else None
        return StepResult(metrics, plan.num_samples, skipped=skipped)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR and SSIM on held-out shots, over all frames and for the last one."""
        valid_clips = self.batches.valid_clips
        assert valid_clips is not None, "checked when the job was made"
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.pgs.device)
        with self.ema.applied() if self.ema is not None else nullcontext():
            for clip in valid_clips[self.pgs.dp_cp_rank :: self.pgs.dp_cp_size]:
                video = clip.unsqueeze(0).to(self.pgs.device)
                with self._autocast():
                    reconstruction = self.trainee.reconstruct(video).float()
                psnr, similarity = psnr_per_frame(reconstruction, video)[0], ssim(reconstruction, video)[0]
                sums += torch.stack([psnr.mean(), psnr[-1], similarity, torch.ones_like(similarity)])
        psnr_sum, last_sum, ssim_sum, count = all_reduce_sum(sums, self.pgs.dp_cp).tolist()
        return {"psnr": psnr_sum / count, "psnr_last_frame": last_sum / count, "ssim": ssim_sum / count}

    def save(self, state: TrainState) -> None:
        """Write a checkpoint into `--save`, or begin to: a release folder, which others load, and what training needs.

        Every rank calls it: with the distributed optimizer each has a part of the moments.
        """
        assert self.writer is not None, "the loop saves where there is a --save folder"
        weights = self.model.state_dict()
        content = {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "weights": weights,
            "projection": self._projection_state(),
            "ema": self.ema.weights if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "adversary": self.adversary.state_dict() if self.adversary is not None else None,
        }
        released = weights if self.ema is None else weights | self.ema.weights
        record = {"job": to_dict(self.job), "iteration": state.iteration, "order": self.batches.sample_order()}
        self.writer.save(
            state.iteration,
            lambda target: plan_fsae_checkpoint(
                target,
                self.model,
                released,
                content,
                record,
                is_rank_zero=self.pgs.is_rank_zero,
                in_background=self.writer.in_background,
            ),
        )

    def is_saving(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self.writer is not None and self.writer.is_writing()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the newest."""
        if self.writer is not None:
            self.writer.finish()

    def load(self) -> TrainState:
        """Continue from the newest undamaged checkpoint in `--load`; without one start from `--init-from`, or anew.

        Raises:
            ValueError: all checkpoints are damaged, or the newest is of another architecture or of another phase; or
                `--save` holds one that would be overwritten.
        """
        start = self.pgs.on_rank_zero(lambda: find_starting_point(self.job.checkpoint, new_stage=False))
        if start.folder is None:
            return TrainState()
        if start.is_initial:
            self._inherit(str(start.folder))
            return TrainState()
        checkpoint = newest_good_checkpoint(start.folder, self.pgs)
        if start.is_own:
            self.writer.resume_from(checkpoint.iteration)
        source, record = checkpoint.path, {"job": checkpoint.record.run.job, "order": checkpoint.record.run.order}
        if wrong := differences(from_dict(FSAEConfig, record["job"]["model"]), self.job.model):
            raise ValueError(f"the checkpoint {source} has another architecture: {'; '.join(wrong)}")
        content = torch.load(source / TRAINING_FILE, map_location=self.pgs.device, weights_only=True)
        self.model.load_state_dict(content["weights"])
        if start.purpose == "finetune":
            return TrainState()
        saved = from_dict(FSAEJob, record["job"])
        if saved.phase.phase != self.job.phase.phase:
            raise ValueError(
                f"the checkpoint {source} is of phase {saved.phase.phase}, this run of phase {self.job.phase.phase}: "
                "give it a --load and --save folder of its own, and the other as --init-from"
            )
        if record["order"] is not None:
            remedy = "start from it as --init-from, with a --save folder of its own"
            check_order(record["order"], self.batches.sample_order(), str(source), remedy)
        self._load_training_state(content, source)
        return TrainState(content["iteration"], content["consumed_samples"])

    def _load_training_state(self, content: dict, source: Path) -> None:
        if (content.get("adversary") is None) != (self.adversary is None):
            raise ValueError(
                f"the checkpoint {source} was trained {'without' if self.adversary else 'with'} a discriminator: keep "
                "gan_weight as it was, or start from it with --init-from"
            )
        self.optimizer.load_state_dict(content["optimizer"])
        if self.adversary is not None:
            self.adversary.load_state_dict(content["adversary"])
        if self.trainee.projection is not None:
            self.trainee.projection.load_state_dict(content["projection"])
        if self.ema is not None:
            self.ema.load(content["ema"] or content["weights"])

    def _inherit(self, source: str) -> None:
        fresh = inherit_autoencoder(source, self.model)
        has_discriminator = self.adversary is not None and inherit_discriminator(source, self.adversary)
        if self.ema is not None:
            self.ema.restart()
        if self.pgs.is_rank_zero:
            print(f"autoencoder from {source}; fresh tensors: {', '.join(fresh) or 'none'}", flush=True)
            if self.adversary is not None:
                print(f"discriminator: {f'from {source}' if has_discriminator else 'fresh'}", flush=True)

    def _begin_video(self, iteration: int) -> None:
        warmup = self.job.phase.image_warmup_iters
        if warmup and iteration == warmup:
            begin_video(self.model)
            self.optimizer.restart()
            if self.ema is not None:
                self.ema.restart()

    def _micro_batch(
        self,
        first: int,
        plan: BatchPlan,
        iteration: int,
        transform: LatentTransform | None,
        adversary: Adversary | None,
    ) -> dict[str, Tensor]:
        """Add the gradients of the micro-batch that begins with sample `first`; its loss and the loss's parts."""
        weight = plan.micro_batch_size * self._place(plan)[1] / plan.num_samples
        video = self.batches.read(first, plan).to(self.pgs.device)
        if transform is not None and transform.role == "before_encoding":
            video, transform = transform.of_video(video, self.model.spatial_factor), None
        learns = not self._autoencoder_rests(iteration)
        share = ClipShare(self.pgs.cp, video.shape[2]) if plan.is_shared else None
        box = draw_patch(self.model, self.job, first, video if share is None else share.of(video))
        with torch.set_grad_enabled(learns):
            with self._autocast():
                features = self.objective.features(video)
                size = None if features is None else features.shape[3:]
                noise = self._latent_noise(first, video)
                noise_seed = derive_seed(self.job.training.seed, first, "decoder_noise")
                output = (self.wrapped if learns else self.trainee)(
                    video, noise, transform, size, noise_seed, box, share
                )
            loss, parts = self.objective(
                output, video, self.model, features=features, transform=transform, adversary=adversary, share=share
            )
        if learns:
            (loss * weight).backward()
        if adversary is not None:
            with torch.no_grad():
                fake = whole_reconstruction(output, share)
            real = video if output.region is None else whole_region(output.region, share).of(video)
            parts |= adversary.backward(real, fake, iteration, weight)
        return {"loss": loss.detach(), **parts}

    def _update(self, iteration: int, adversary: Adversary | None, is_finite: bool) -> dict[str, float]:
        """Step what has learnt, unless a loss was not finite; gradient norms and the learning rate."""
        metrics = {"grad_norm": 0.0, "learning_rate": 0.0}
        if not is_finite:
            self.optimizer.discard()
            if adversary is not None:
                adversary.optimizer.discard()
            return metrics
        if not self._autoencoder_rests(iteration):
            metrics["grad_norm"], metrics["learning_rate"] = self.optimizer.step(iteration)
            if self.ema is not None and math.isfinite(metrics["grad_norm"]):
                self.ema.update(iteration + 1)
        if adversary is not None:
            metrics["discriminator_grad_norm"] = adversary.step(iteration)
        return metrics

    def _blame(self, broken: list[str], plan: BatchPlan, state: TrainState) -> str:
        """Which clips of the run had a loss that is not finite, else all of the batch; every rank calls this."""
        ranges = [name for names in gather_objects(broken) for name in names]
        first = state.consumed_samples
        return f"clips {' '.join(ranges) or f'{first}-{first + plan.num_samples - 1}'} of shape {plan.bucket}"

    def _place(self, plan: BatchPlan) -> tuple[int, int]:
        """(which, of how many) parts of the batch this rank computes."""
        if plan.is_shared:
            return self.pgs.dp_rank, self.pgs.dp_size
        return self.pgs.dp_cp_rank, self.pgs.dp_cp_size

    def _autoencoder_rests(self, iteration: int) -> bool:
        return self.adversary is not None and self.adversary.learns_alone(iteration)

    def _draw_transform(self, plan: BatchPlan, state: TrainState) -> LatentTransform | None:
        """One for the whole step, so that all ranks do the same."""
        if self._autoencoder_rests(state.iteration):
            return None
        factor, seed = self.model.spatial_factor, self.job.training.seed
        grid = (plan.bucket.height // factor, plan.bucket.width // factor)
        return draw_transform(self.job.alignment.latent_regularizer, seed, state.consumed_samples, grid)

    def _latent_noise(self, first: int, video: Tensor) -> Tensor | None:
        strength = self.job.losses.latent_noise
        if strength == 0:
            return None
        factor = self.model.spatial_factor
        frames = (video.shape[2] - 1) // self.model.temporal_factor + 1
        shape = (len(video), self.model.latent_channels, frames, video.shape[3] // factor, video.shape[4] // factor)
        return draw_latent_noise(self.job.training.seed, first, shape, strength).to(self.pgs.device)

    def _build_projection(self) -> LatentProjection | None:
        if self.objective.dino is None:
            return None
        return LatentProjection(self.job.model.latent_channels, self.objective.dino.channels).to(self.pgs.device)

    def _projection_state(self) -> dict[str, Tensor] | None:
        return None if self.trainee.projection is None else self.trainee.projection.state_dict()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.pgs.device.type, torch.bfloat16, enabled=self.job.training.bf16)

    def _mean_over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.pgs.device)
        return (all_reduce_sum(total, self.pgs.dp_cp) / self.pgs.dp_cp_size).tolist()
