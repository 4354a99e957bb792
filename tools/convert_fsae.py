"""Make the start of an autoencoder's training phase: from DC-AE weights, or from the phase before.

    # The paper's start: DC-AE's stages inflated to video, a fresh seventh stage
    python tools/convert_fsae.py --preset fsae_causal --load dc-ae-f32c32-sana-1.0-diffusers --save start

    # Phase 4 -> FSAE-Standard -> FSAE-Lite
    python tools/convert_fsae.py --preset fsae_standard --load runs/phase4 --save standard
    python tools/convert_fsae.py --preset fsae_lite --load standard --save lite

Writes a release folder (for pretrain_fsae.py --init-from) and prints every tensor that starts fresh.
`--match-dc-ae` makes an FSAE with the sizes of the DC-AE instead, which decodes the DC-AE's images frame by frame.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fsvideo.config import FSAE_PRESETS, FSAEConfig, differences, from_dict, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, Share
from megatron_fsvideo.data.listing import files_in

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_fsvideo.models.fsae import FSAE


@dataclass(frozen=True)
class ConvertFlags(Checked):
    """what to convert"""

    load: PathText
    """Release folder or --save folder of an FSAE, or a DC-AE with the names of diffusers or MIT: a safetensors file, a
    folder of such files, or a torch file that holds only tensors."""
    save: PathText
    """Release folder to write."""
    overwrite: bool = False
    """Replace the release folder of an earlier run."""
    match_dc_ae: bool = False
    """Take the model's sizes from the DC-AE instead of from flags, which may then not be given."""
    max_fresh_fraction: Share = 0.75
    """Largest share of tensors that may start fresh. If more would, the source hardly fits the model."""
    seed: Count = 0
    """Seed of new tensors."""


@dataclass(frozen=True)
class ConvertJob:
    """Make the start of an autoencoder's training phase."""

    convert: ConvertFlags
    model: FSAEConfig = field(default_factory=FSAEConfig)


def run(job: ConvertJob) -> None:
    """Convert, write, and list the tensors that start fresh."""
    from megatron_fsvideo.checkpoint.release import check_release_folder, save_fsae

    check_release_folder(job.convert.save, overwrite=job.convert.overwrite)
    fsae, fresh, unused = convert(job)
    total = len(fsae.state_dict())
    if len(fresh) > job.convert.max_fresh_fraction * total:
        raise ValueError(
            f"{len(fresh)} of {total} tensors would start fresh (the first: {', '.join(fresh[:3])}): "
            f"{job.convert.load} hardly fits the model; check the sizes, or raise --max-fresh-fraction"
        )
    save_fsae(job.convert.save, fsae)
    print(f"{job.convert.save}: {total - len(fresh)} of {total} tensors from {job.convert.load}, {len(fresh)} fresh")
    print("\n".join([f"fresh: {name}" for name in fresh] + [f"not used: {name}" for name in unused]))


def main() -> None:
    """Parse the command line and convert."""
    names = {f.name for f in dataclasses.fields(FSAEConfig)}
    presets = {
        preset: {name: value for name, value in values.items() if name in names}
        for preset, values in FSAE_PRESETS.items()
    }
    run(parse_job(ConvertJob, presets))


def convert(job: ConvertJob) -> tuple[FSAE, list[str], list[str]]:
    """Return (the autoencoder, its tensors that start fresh, source tensors that are not used).

    Raises:
        ValueError: the source cannot be read, or cannot become the requested FSAE.
    """
    import torch

    from megatron_fsvideo.checkpoint.release import check_weights, load_release, resolve_release
    from megatron_fsvideo.conversion.dcae_names import dcae_config, start_from_dcae, to_diffusers_names
    from megatron_fsvideo.models.fsae import FSAE
    from megatron_fsvideo.models.fsae.phases import inherit

    source = resolve_release(job.convert.load)
    torch.manual_seed(job.convert.seed)
    if _is_fsae(source):
        config, weights = load_release(source)
        before = from_dict(FSAEConfig, config["model"])
        with torch.device("meta"):
            check_weights(str(source), FSAE(before), weights)
        fsae = FSAE(job.model)
        fresh = inherit(fsae, before, weights)
        return fsae, fresh, sorted(set(weights) - set(fsae.state_dict()))
    state = to_diffusers_names(read_tensors(source))
    if job.convert.match_dc_ae and (given := differences(FSAEConfig(), job.model)):
        names = ", ".join("--" + line.split(":")[0].replace("_", "-") for line in given[:3])
        raise ValueError(f"--match-dc-ae takes all sizes from {source}; leave out {names}, or --match-dc-ae")
    fsae = FSAE(dcae_config(state) if job.convert.match_dc_ae else job.model)
    fresh, unused = start_from_dcae(fsae, state)
    if len(fresh) == len(fsae.state_dict()):
        raise ValueError(f"{source} has no tensor that fits: it is neither an FSAE release nor a DC-AE")
    return fsae, fresh, unused


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, a folder of them, or a torch file, without running code from it.

    Raises:
        ValueError: there is no file, it is damaged, or it is a torch file with objects other than tensors.
    """
    from megatron_fsvideo.models.frozen.weight_files import read_weight_file

    files = files_in(source, ".safetensors") if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise ValueError(f"{source} is neither a file of tensors nor a folder with safetensors files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_weight_file("--load", str(file))
    return tensors


def _is_fsae(source: Path) -> bool:
    from megatron_fsvideo.checkpoint.dit_release import read_config
    from megatron_fsvideo.checkpoint.release import CONFIG_FILE, FSAE_FORMAT

    config = source / CONFIG_FILE
    return config.is_file() and read_config(source).get("format") == FSAE_FORMAT


if __name__ == "__main__":
    run_script(main)
