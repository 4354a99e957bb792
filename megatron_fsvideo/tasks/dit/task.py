"""The DiT's task: flow matching on latents, through Megatron's schedule (paper section 3)."""

import sys

import torch
from torch import Tensor

from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord
from megatron_fsvideo.config import DiTJob, to_dict
from megatron_fsvideo.evaluation.router_images import RouterImages
from megatron_fsvideo.inference.validation_videos import ValidationVideos
from megatron_fsvideo.models.codecs import LatentScale
from megatron_fsvideo.models.dit.layer_memory import count_frozen_routers
from megatron_fsvideo.models.flops import dit_training_flops
from megatron_fsvideo.parallel.groups import ProcessGroups, all_reduce_sum, gather_objects
from megatron_fsvideo.tasks.dit.batches import (
    BatchSource,
    describe_batches,
    open_training_data,
    open_validation_data,
    sample_order,
)
from megatron_fsvideo.tasks.dit.network import build_dit_network
from megatron_fsvideo.tasks.dit.objective import NUM_SIGMA_BINS, DiTObjective, pad_rows
from megatron_fsvideo.training.state import StepResult, TrainState
from megatron_fsvideo.training.task import Generated, Task


class DiTTask(Task):
    """The network, the data and the objective of a DiT job.

    Attributes:
        networks: the network `dit`.

    Raises:
        ValueError: the dataset, the layout and the model do not fit each other.
    """

    def __init__(self, job: DiTJob, pgs: ProcessGroups) -> None:
        self.job, self.pgs = job, pgs
        self.dataset = open_training_data(job, pgs.dp_size)
        self.valid_dataset = open_validation_data(job, pgs.dp_size, self.dataset.scale)
        codec = self.dataset.description()["autoencoder"]
        self.network = build_dit_network(job, pgs, {"codec": codec, "diffusion": to_dict(job.diffusion)})
        self.networks = {self.network.name: self.network}
        null_text = pad_rows(self.dataset.null_text, self.dataset.text_length)
        self.objective = DiTObjective(job, null_text, pgs.device)
        self.router_images = RouterImages(job, pgs)
        self.videos: ValidationVideos | None = None
        if job.sampling.sample_interval:
            assert self.valid_dataset is not None, "checked when the job was made"
            self.videos = ValidationVideos(job, self.network.model, self.valid_dataset, pgs)
        self._source: BatchSource | None = None

    def train_step(self, state: TrainState) -> StepResult:
        """Do one optimizer step."""
        if self._source is None:
            self._source = BatchSource(self.dataset, self.job, self.pgs, consumed_samples=state.consumed_samples)
        batches, num_samples, tokens = self._source.next()
        shape = tuple(batches[0].latents.shape[2:])
        self.objective.errors.clear()
        with self.router_images.watching(state.iteration + 1, self.network.chunks, shape):
            collected = self.network.accumulate(batches, self.objective.training_step)
        loss, mse = self._mean_over_batch(collected, len(batches))
        outcome = self.network.step(state.iteration, loss)
        metrics = {
            "loss": loss,
            "grad_norm": outcome.grad_norm,
            "learning_rate": outcome.learning_rate,
            "velocity_mse": mse,
            "bad_samples": float(len(self.dataset.bad_samples)),
        }
        image_tokens = batches[0].image.shape[1] if batches[0].image is not None else 0
        flops = num_samples * dit_training_flops(self.job.model, tokens, self.dataset.text_length, image_tokens)
        skipped = None
        if not outcome.has_stepped:
            skipped = f"the loss is {loss}, the gradient norm {outcome.grad_norm}; {self._blame()}"
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
        """Velocity error of the averaged weights on normalised latents with fixed noise, also by noise level."""
        assert self.valid_dataset is not None, "checked when the job was made"
        source = BatchSource(self.valid_dataset, self.job, self.pgs, shuffle=False)
        sums = torch.zeros(3, NUM_SIGMA_BINS, dtype=torch.float64, device=self.pgs.device)
        with self.network.averaged(), torch.no_grad():
            for _ in range(self.job.training.eval_iters):
                batches = source.next()[0]
                for entry in self.network.accumulate(batches, self.objective.validation_step, forward_only=True):
                    sums += entry["sums"]
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

    def generate(self, state: TrainState) -> Generated | None:
        """Generate the validation videos at their interval and at the end."""
        is_last = state.iteration == self.job.training.train_iters
        if self.videos is None or (state.iteration % self.job.sampling.sample_interval and not is_last):
            return None
        with self.network.averaged():
            error, sheet = self.videos.write(state.iteration)
        return Generated({"video_latent_mse": error}, {} if sheet is None else {"validation_videos": sheet})

    def describe(self) -> RunDescription:
        """Describe the data. After loading, their scale is that of the loaded weights."""
        return RunDescription(to_dict(self.job), self.dataset.description(), sample_order(self.dataset, self.job))

    def summary(self) -> list[str]:
        """The folders, and samples and batch of each bucket."""
        named = {"data": self.dataset, "validation": self.valid_dataset}
        return [describe_batches(name, data, self.job) for name, data in named.items() if data is not None]

    def begins(self, record: RunRecord | None) -> None:
        """Normalise the latents with the scale that the loaded weights were trained with, not with this dataset's."""
        self._warn_of_frozen_routers()
        if record is None or record.run.data is None or self.job.stage.latent_scale == "data":
            return  # initial weights, or weights of another model, have no scale yet
        for dataset in (self.dataset, self.valid_dataset):
            if dataset is not None:
                dataset.scale = LatentScale(record.run.data["latent_mean"], record.run.data["latent_std"])

    def _warn_of_frozen_routers(self) -> None:
        """Print a warning on the first rank of each stage if its routers cannot learn from the present weights."""
        count = count_frozen_routers(self.network.chunks)
        if count and self.pgs.tp_rank == self.pgs.dp_cp_rank == 0:
            print(
                f"warning: {count} layer-memory routers give one state all the weight, so that their gradient vanishes "
                "and they never learn: start with layer_memory_init 0.99, or train without layer memory",
                file=sys.stderr,
                flush=True,
            )

    def _mean_over_batch(self, collected: list[dict[str, Tensor]], num_microbatches: int) -> list[float]:
        """Loss and velocity error of the global batch, on every rank. Only the last stage has `collected`."""
        sums = torch.zeros(2, device=self.pgs.device)
        for entry in collected:
            sums += entry["sums"]
        return (self._sum_over_ranks(sums) / (num_microbatches * self.pgs.dp_size)).tolist()

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        return all_reduce_sum(all_reduce_sum(sums, self.pgs.dp), self.pgs.pp)

    def _blame(self) -> str:
        """Name the samples of the last batch without a finite loss, or all if there are none; every rank calls this."""
        assert self._source is not None, "there was an iteration"
        broken = set().union(*gather_objects(self.objective.broken_samples()))
        names = self._source.sample_names()
        chosen = [name for key, name in names.items() if key in broken] or list(names.values())
        return f"samples ({len(chosen)} of {len(names)} in the batch): {' '.join(chosen)}"
