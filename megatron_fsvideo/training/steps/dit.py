"""The DiT's step: flow matching on latents with Megatron's schedule, optimizer and checkpoints (paper section 3)."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_fsvideo.checkpoint.dit_release import DiTNetwork
from megatron_fsvideo.checkpoint.run_record import RunDescription
from megatron_fsvideo.config import DiTJob, to_dict
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.stored_batch import StoredBatch
from megatron_fsvideo.diffusion.flow_matching import white_latents_bound
from megatron_fsvideo.diffusion.losses import loss_of_mse
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.models.dit import Denoiser, build_dit_chunks
from megatron_fsvideo.models.dit.layer_memory import count_frozen_routers
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.optim.moving_average import MovingAverage
from megatron_fsvideo.optim.optimizer import build_optimizer, reload_masters, step_if_finite, wrap_ddp
from megatron_fsvideo.optim.schedule import learning_rate, set_learning_rates
from megatron_fsvideo.optim.state import load_optimizer_state, sharded_optimizer_state, sharded_weights
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum, gather_objects
from megatron_fsvideo.parallel.pipeline import run_schedule
from megatron_fsvideo.training.flops import dit_training_flops
from megatron_fsvideo.training.network import prefixed
from megatron_fsvideo.training.router_images import RouterImages
from megatron_fsvideo.training.run_checkpoints import RunCheckpoints
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.steps.dit_batches import (
    BatchSource,
    check_batches,
    check_data_fits_model,
    sample_order,
    training_filter,
    validation_filter,
)
from megatron_fsvideo.training.steps.dit_objective import (
    hidden_first_frames,
    make_noisy,
    pad_rows,
    training_draws,
    validation_draws,
    velocity_mse,
)

NUM_SIGMA_BINS = 4

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class DiTStep:
    """Model, optimizer, moving average and data of a DiT job.

    Raises:
        ValueError: the dataset, the layout and the model do not fit each other.
    """

    def __init__(self, job: DiTJob, pgs: ProcessGroups) -> None:
        self.job = job
        self.pgs = pgs
        self.dataset = LatentDataset(
            job.data.data_path, job.data.max_bad_fraction, sample_filter=training_filter(job.data)
        )
        check_data_fits_model(self.dataset, job.model, job.parallel)
        check_batches(self.dataset, job, pgs.dp_size)
        self.valid_dataset = self._open_validation()
        dtype = torch.bfloat16 if job.training.bf16 else torch.float32
        chunks = build_dit_chunks(job.model, job.parallel, pgs, params_dtype=dtype, seed=job.training.seed)
        self.chunks = nn.ModuleList(chunks)  # one, or with virtual pipeline stages this rank's several
        self.wrapped = wrap_ddp(chunks, chunks[0].config, job.parallel, pgs)
        rules = dit_parameter_rules(chunks, job.optimizer.router_lr_mult)
        self.optimizer = build_optimizer(self.wrapped, job.optimizer, rules, pgs)
        decay = job.optimizer.ema_decay
        self.ema = MovingAverage(self.optimizer, sharded_weights(chunks), decay) if decay else None
        self.null_text = pad_rows(self.dataset.null_text, self.dataset.text_length)
        self.router_images = RouterImages(job, pgs)
        self.networks = {"dit": self}
        self.checkpoints = RunCheckpoints(
            job.checkpoint,
            # The latents' scale becomes the checkpoint's after it is loaded.
            lambda: RunDescription(to_dict(job), self.dataset.description(), sample_order(self.dataset, job)),
            pgs,
            train_iters=job.training.train_iters,
            new_stage=job.stage.new_stage,
        )
        self._source: BatchSource | None = None
        self._errors: list[tuple[Tensor, Tensor]] = []  # sample ids and their velocity errors, of the last iteration

    def train_step(self, state: TrainState) -> StepResult:
        """One optimizer step."""
        if self._source is None:
            self._source = self._batches(self.dataset, state.consumed_samples, shuffle=True)
        batches, num_samples, tokens = self._source.next()
        settings, iterations = self.job.optimizer, self.job.training.train_iters
        # The schedule is one of iterations, whatever the size of this bucket's batch.
        set_learning_rates(self.optimizer.param_groups, state.iteration + 1, iterations, settings)

        self._errors.clear()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        shape = tuple(batches[0].latents.shape[2:])
        with self.router_images.watching(state.iteration + 1, self.chunks, shape):
            collected = self._run(batches, self._training_step, forward_only=False)
        loss, mse = self._mean_over_batch(collected, len(batches))
        grad_norm, has_stepped = step_if_finite(self.optimizer, loss, self.pgs)
        if self.ema is not None and has_stepped:
            self.ema.update(state.iteration + 1)

        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(state.iteration + 1, iterations, settings, settings.lr, settings.min_lr),
            "velocity_mse": mse,
            "bad_samples": float(len(self.dataset.bad_samples)),
        }
        image_tokens = batches[0].image.shape[1]
        flops = num_samples * dit_training_flops(self.job.model, tokens, self.dataset.text_length, image_tokens)
        skipped = None if has_stepped else f"the loss is {loss}, the gradient norm {grad_norm}; {self._blame()}"
        return StepResult(
            metrics,
            num_samples,
            num_samples * tokens,
            flops,
            self._source.data_wait,
            images=self.router_images.images(),
            skipped=skipped,
        )

    def validate(self) -> dict[str, float]:
        """Velocity error in normalised latents with fixed noise, also by noise level, of the averaged weights."""
        assert self.valid_dataset is not None, "checked when the job was made"
        source = self._batches(self.valid_dataset, 0, shuffle=False)
        sums = torch.zeros(3, NUM_SIGMA_BINS, dtype=torch.float64, device=self.pgs.device)
        with self.averaged():
            self._validate_batches(source, sums)
        source.close()
        errors, bounds, counts = self._sum_over_ranks(sums)
        metrics = {
            "velocity_mse": (errors.sum() / counts.sum()).item(),
            "white_latents_bound": (bounds.sum() / counts.sum()).item(),
        }
        for k in range(NUM_SIGMA_BINS):
            if counts[k]:
                low, high = k / NUM_SIGMA_BINS, (k + 1) / NUM_SIGMA_BINS
                metrics[f"velocity_mse_sigma_{low:.2f}_{high:.2f}"] = (errors[k] / counts[k]).item()
        return metrics

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model evaluates, with the averaged weights if there are any."""
        self._set_training(False)
        try:
            with self.ema.applied() if self.ema is not None else nullcontext():
                yield
        finally:
            self._set_training(True)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint into `--save`."""
        self.checkpoints.save(state, self.networks)

    def is_saving(self) -> bool:
        """Whether this rank still writes a checkpoint."""
        return self.checkpoints.is_saving()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it the newest."""
        self.checkpoints.finish()

    def warn_of_frozen_routers(self) -> None:
        """Say on the first rank of each stage if its routers cannot learn, with the weights as they are now."""
        count = count_frozen_routers(self.chunks)
        if count and self.pgs.tp_rank == self.pgs.dp_cp_rank == 0:
            print(
                f"warning: {count} layer-memory routers give one state all the weight, so that their gradient vanishes "
                "and they never learn: start with layer_memory_init 0.99, or train without layer memory",
                file=sys.stderr,
                flush=True,
            )

    def load(self) -> TrainState:
        """Begin or continue as the flags and the folders say (checkpoint/starting_point.py).

        Raises:
            ValueError: the checkpoint is of another architecture, autoencoder or dataset, or damaged; or `--save` holds
                one that would be overwritten.
        """
        state = self.checkpoints.load(self.networks)
        loaded = self.checkpoints.loaded
        if loaded is not None and loaded.run.data is not None:
            self._normalize_with(loaded.run.data["latent_mean"], loaded.run.data["latent_std"])
        return state

    def section(self, is_loading: bool, *, with_optimizer: bool, with_average: bool) -> dict[str, Any]:
        """What a checkpoint holds, as Megatron's sharded tensors of this rank's slices."""
        content: dict[str, Any] = {}
        if self.ema is not None and with_average:
            content["ema"] = self.ema.sharded_state(self._sharded_weights())
        if with_optimizer:
            content["optimizer"] = sharded_optimizer_state(self.optimizer, self._sharded_weights())
        content["model"] = prefixed(self._sharded_weights(), "model.")
        return prefixed(content, "dit.")

    def load_section(self, content: dict[str, Any], *, with_optimizer: bool, with_average: bool) -> None:
        """Take in what was read; an average that was not read begins at the weights."""
        missing, _ = self.chunks.load_state_dict(content["model"], strict=False)
        assert all(name.endswith("_extra_state") for name in missing), missing
        if with_optimizer:
            load_optimizer_state(self.optimizer, self._sharded_weights(), content["optimizer"])
        else:
            reload_masters(self.optimizer)
        if self.ema is not None and with_average:
            self.ema.load_state(content["ema"])
        elif self.ema is not None:
            self.ema.restart()

    def record(self) -> dict[str, Any]:
        """What a checkpoint says about the network."""
        job = self.job
        network = DiTNetwork(job.model, job.diffusion, job.training.bf16, self.ema is not None)
        autoencoder = self.dataset.description()["autoencoder"]
        return network.to_json() | {"codec": autoencoder, "optimizer": {"optimizer": job.optimizer.optimizer}}

    def _normalize_with(self, mean: list[float], std: list[float]) -> None:
        """The weights know latents of this mean and std per channel, whatever another dataset's are."""
        for dataset in (self.dataset, self.valid_dataset):
            if dataset is not None:
                dataset.scale = LatentScale(mean, std)

    def _training_step(
        self, iterator: Iterator[StoredBatch], wrapped: DistributedDataParallel
    ) -> tuple[Tensor, LossFunction]:
        """Megatron's forward step: the prediction, and a function of it that is the loss."""
        batch = next(iterator).to(self.pgs.device)
        diffusion = self.job.diffusion
        seed = self.job.training.seed
        denoiser = Denoiser(wrapped.module, diffusion.prediction_type)
        noisy = make_noisy(
            batch,
            training_draws(batch, diffusion, seed),
            self.null_text,
            self.job.model,
            diffusion,
            hidden_first_frames(batch, diffusion, seed),
        )

        def loss_function(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mse = velocity_mse(prediction, noisy, denoiser)
            loss = loss_of_mse(mse, noisy.target[0].numel(), diffusion.loss_type, diffusion.huber_c).mean()
            self._errors.append((batch.sample_ids, mse.detach()))
            # Cloned, because the schedule scales the loss in place.
            return loss, {"sums": torch.stack([loss.detach(), mse.detach().mean()])}

        return denoiser.predict(noisy.noisy_latents, noisy.sigmas, noisy.condition), loss_function

    def _validation_step(
        self, iterator: Iterator[StoredBatch], wrapped: DistributedDataParallel
    ) -> tuple[Tensor, LossFunction]:
        batch = next(iterator).to(self.pgs.device)
        draws = validation_draws(batch, self.job.diffusion, self.job.training.seed)
        denoiser = Denoiser(wrapped.module, self.job.diffusion.prediction_type)
        noisy = make_noisy(batch, draws, self.null_text, self.job.model, self.job.diffusion)

        def loss_function(prediction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mse = velocity_mse(prediction, noisy, denoiser)
            values = torch.stack([mse, white_latents_bound(noisy.sigmas), torch.ones_like(mse)]).double()  # (3, b)
            bins = (noisy.sigmas * NUM_SIGMA_BINS).long().clamp(max=NUM_SIGMA_BINS - 1)
            sums = values.new_zeros(3, NUM_SIGMA_BINS).index_add_(1, bins, values)
            return mse.mean(), {"sums": sums}

        return denoiser.predict(noisy.noisy_latents, noisy.sigmas, noisy.condition), loss_function

    def _blame(self) -> str:
        """Which samples of the last global batch have no finite loss, else all of them; every rank calls this."""
        assert self._source is not None, "there was an iteration"
        mine = {key for ids, errors in self._errors for key in ids[~errors.isfinite()].tolist()}
        broken = set().union(*gather_objects(mine))
        names = self._source.sample_names()
        chosen = [name for key, name in names.items() if key in broken] or list(names.values())
        return f"samples ({len(chosen)} of {len(names)} in the batch): {' '.join(chosen)}"

    def _run(self, batches: list[StoredBatch], forward_step: Callable, forward_only: bool) -> list[Tensor]:
        """Megatron's schedule over the micro-batches; what the loss functions returned, on the last stage."""
        collected = run_schedule(forward_step, self.wrapped, batches, self.pgs, forward_only=forward_only)
        return [entry["sums"] for entry in collected]

    def _set_training(self, is_training: bool) -> None:
        for chunk in self.wrapped:
            chunk.train(is_training)

    @torch.no_grad()
    def _validate_batches(self, source: BatchSource, sums: Tensor) -> None:
        for _ in range(self.job.training.eval_iters):
            for collected in self._run(source.next()[0], self._validation_step, forward_only=True):
                sums += collected

    def _mean_over_batch(self, collected: list[Tensor], num_microbatches: int) -> list[float]:
        """Loss and velocity error of the global batch, on every rank: only the last stage has `collected`."""
        sums = torch.zeros(2, device=self.pgs.device)
        for entry in collected:
            sums += entry
        return (self._sum_over_ranks(sums) / (num_microbatches * self.pgs.dp_size)).tolist()

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return all_reduce_sum(all_reduce_sum(sums, self.pgs.dp), self.pgs.pp)

    def _batches(self, dataset: LatentDataset, consumed_samples: int, shuffle: bool) -> BatchSource:
        return BatchSource(dataset, self.job, self.pgs, consumed_samples=consumed_samples, shuffle=shuffle)

    def _open_validation(self) -> LatentDataset | None:
        if self.job.training.eval_iters == 0:
            return None
        if not self.job.data.valid_data_path:
            raise ValueError("eval_iters is positive, but valid_data_path names no dataset")
        data = self.job.data
        dataset = LatentDataset(
            data.valid_data_path, data.max_bad_fraction, self.dataset.scale, validation_filter(data)
        )
        check_data_fits_model(dataset, self.job.model, self.job.parallel)
        check_batches(dataset, self.job, self.pgs.dp_size)
        return dataset

    def _sharded_weights(self) -> dict[str, ShardedTensor]:
        return sharded_weights(self.chunks)
