"""Plot the mean routing weight of layer memory per layer and source state (paper Figure 6).

    python tools/plot_router.py --load runs/dit --data-path runs/latents --out runs/router.png

    torchrun --nproc-per-node 2 tools/plot_router.py --tensor-model-parallel-size 2 ...

Two heat maps, for the tokens of the first frame and for the others. Beside router.png it writes router.json with the
numbers. Samples are taken in stored order, at noise levels as in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fsvideo.config import DiTParallelConfig, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fsvideo.data.latent_dataset import LatentDataset
    from megatron_fsvideo.inference.loading import LoadedDiT
    from megatron_fsvideo.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class PlotFlags(Checked):
    """which model, which data"""

    load: PathText
    """Folder of the model: a --save folder of pretrain_dit.py, or a release."""
    data_path: tuple[PathText, ...]
    """Latent dataset folders."""
    out: PathText = "router.png"
    """PNG file to write. A JSON file with the same name holds the numbers."""
    overwrite: bool = False
    """Replace both files of an earlier run."""
    num_samples: PositiveInt = 16
    """Largest number of samples of each bucket and folder."""
    micro_batch_size: PositiveInt = 4
    """Samples in one forward pass."""
    seed: Count = 1234
    """Seed of noise and noise levels."""
    use_ema: bool = True
    """Use the moving average of the weights."""


@dataclass(frozen=True)
class PlotJob:
    """Plot where layer memory looks."""

    plot: PlotFlags
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)


def plot(job: PlotJob) -> None:
    """Load the model, collect routing weights, and write the plots."""
    from megatron_fsvideo.inference.loading import load_dit
    from megatron_fsvideo.parallel import groups

    out = Path(job.plot.out)
    check_outputs([out, out.with_suffix(".json")], overwrite=job.plot.overwrite)
    pgs = groups.initialize(job.parallel)
    dit = load_dit(job.plot.load, job.parallel, pgs, job.plot.use_ema)
    dataset = open_dataset(job, dit)
    weights, num_samples = collect(job, dit, dataset, pgs)
    if pgs.is_rank_zero:
        write(job.plot, dit, weights, num_samples)
    groups.shutdown()


def main() -> None:
    """Parse the command line and plot."""
    plot(parse_job(PlotJob))


def open_dataset(job: PlotJob, dit: LoadedDiT) -> LatentDataset:
    """Open the dataset with the normalisation that the model was trained with.

    Raises:
        ValueError: the latents are of another autoencoder, or of other sizes.
    """
    from megatron_fsvideo.data.latent_dataset import LatentDataset
    from megatron_fsvideo.models.codecs import LatentScale, is_same_encoder, spell_autoencoder
    from megatron_fsvideo.tasks.dit.batches import check_data_fits_model

    dataset = LatentDataset(job.plot.data_path, scale=LatentScale(dit.data["latent_mean"], dit.data["latent_std"]))
    check_data_fits_model(dataset, dit.network.model, job.parallel)
    found, expected = dataset.description()["autoencoder"], dit.data["autoencoder"]
    if not is_same_encoder(found, expected):
        raise ValueError(
            f"the model was trained on latents of the autoencoder {spell_autoencoder(expected)}, {dataset.folders[0]} "
            f"has those of {spell_autoencoder(found)}"
        )
    return dataset


def collect(job: PlotJob, dit: LoadedDiT, dataset: LatentDataset, pgs: ProcessGroups) -> tuple[dict[str, Tensor], int]:
    """Maxima and means over all tokens, as `RouterWeights` returns them, and the number of samples seen."""
    from megatron_fsvideo.data.sampler import SampleRef
    from megatron_fsvideo.data.stored_batch import read_batch
    from megatron_fsvideo.models.dit import Denoiser
    from megatron_fsvideo.models.dit.router_weights import RouterWeights
    from megatron_fsvideo.tasks.dit.objective import make_noisy, pad_rows, validation_draws

    flags, model, diffusion = job.plot, dit.network.model, dit.network.diffusion
    router = RouterWeights(model, job.parallel, pgs)
    denoiser = Denoiser(dit.model, diffusion.prediction_type)
    null_text = pad_rows(dataset.null_text, dataset.text_length)
    total = 0
    for index, stream in enumerate(dataset.streams):
        number = min(flags.num_samples, stream.num_samples)
        refs = [SampleRef(index, position, 0) for position in range(number)]
        # Every data-parallel rank reads all samples. Repeated samples change neither maxima nor means.
        for first in range(0, number, flags.micro_batch_size):
            batch = read_batch(dataset, refs[first : first + flags.micro_batch_size]).to(pgs.device)
            draws = validation_draws(batch, diffusion, flags.seed)
            with router.recording(dit.model, tuple(batch.latents.shape[2:])):
                noisy = make_noisy(batch, draws, null_text, model, diffusion)
                denoiser.predict(noisy.noisy_latents, noisy.sigmas, noisy.condition)
        total += number
    return {"maximum": router.maximum(), "mean": router.mean()}, total


def write(flags: PlotFlags, dit: LoadedDiT, weights: dict[str, Tensor], num_samples: int) -> None:
    """Write the picture of the maxima, the picture of the means beside it, and the JSON of both."""
    from megatron_fsvideo.evaluation.router_figure import write_router_figure
    from megatron_fsvideo.models.dit.router_weights import KINDS

    out = Path(flags.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{flags.load}, iteration {dit.iteration}"
    write_router_figure(out, weights["maximum"], "maximum", title)
    write_router_figure(out.with_name(f"{out.stem}_mean{out.suffix}"), weights["mean"], "mean", title)
    num_layers = weights["mean"].shape[-1]
    values: dict[str, Any] = {
        "load": flags.load,
        "iteration": dit.iteration,
        "data_path": list(flags.data_path),
        "num_samples": num_samples,
        "seed": flags.seed,
        "layers": list(range(2, num_layers + 1)),
        "states": list(range(num_layers)),
    }
    for statistic, kinds in weights.items():
        # JSON has no NaN: null means that a layer does not read a state.
        values[statistic] = {
            name.replace(" ", "_"): [[None if weight != weight else weight for weight in row] for row in part]
            for name, part in zip(KINDS, kinds.tolist(), strict=True)
        }
    write_json(out.with_suffix(".json"), values)
    print(f"{out} and {out.with_suffix('.json')}: {num_samples} samples")


if __name__ == "__main__":
    run_script(main)
