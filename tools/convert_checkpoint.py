"""Convert a DiT's weights: diffusers, the original Wan2.1, release folders, distributed checkpoints, from any to any.

    python tools/convert_checkpoint.py --input Wan2.1-I2V-14B-720P --to-preset dit_14b \
        --output checkpoints/wan_start --output-format distributed

    python tools/convert_checkpoint.py --input checkpoints/dit --output releases/dit --output-format release

One process; needs the memory of about one tensor, whatever the size of the model. With --to-preset the preset's model
starts from the weights: another patch embedding and head for its latents, routers that lean to the identity. Every
weight that starts fresh is listed. docs/conversion.md has the details.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText
from megatron_fsvideo.data.outputs import try_output

if TYPE_CHECKING:
    from megatron_fsvideo.conversion.convert import Conversion


@dataclass(frozen=True)
class ConvertFlags(Checked):
    """what to convert to what"""

    input: PathText
    """Folder to read: a transformer of diffusers (or its pipeline), Wan2.1, a release, or a --save folder."""
    output: PathText
    """Folder to write. It must not exist."""
    output_format: Literal["diffusers", "wan", "release", "distributed"]
    """Format to write. pretrain_dit.py --load --finetune reads a distributed checkpoint at any layout."""
    input_format: Literal["diffusers", "wan", "release", "distributed"] | None = None
    """Format to read. None detects it."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Number format of the weights. bf16 leaves the weights in fp32 that the model keeps in fp32: time embedding,
    modulation, head and router."""
    max_shard_size: PathText = "4GB"
    """Largest size of a safetensors file, such as 5GB or 500MB."""
    use_ema: bool = True
    """Take the moving average of the weights of a distributed checkpoint, if it has one."""
    to_preset: PathText | None = None
    """Preset of the model to start from the weights. Routers are new; for other latents, so are patch embedding and
    head."""
    layer_memory_init: Annotated[float, Meta(gt=0, le=1)] = 0.99
    """With --to-preset: softmax weight of the latest hidden state in new routers. 1.0 equals the model without
    routers."""
    seed: Count = 1234
    """Seed of new weights."""


@dataclass(frozen=True)
class ConvertJob:
    """Convert a DiT's weights between formats."""

    convert: ConvertFlags


def start_job(flags: ConvertFlags) -> DiTJob | None:
    """The job whose model is to start from the weights.

    Raises:
        ValueError: there is no such preset.
    """
    if flags.to_preset is None:
        return None
    if flags.to_preset not in DIT_PRESETS:
        raise ValueError(f"--to-preset {flags.to_preset} is unknown: take one of {', '.join(sorted(DIT_PRESETS))}")
    job = build_job(DiTJob, DIT_PRESETS[flags.to_preset])
    return replace(job, model=replace(job.model, layer_memory_init=flags.layer_memory_init))


def report(conversion: Conversion, flags: ConvertFlags) -> None:
    """Print the output, and every weight that does not come from the source."""
    source = conversion.source
    print(
        f"{source.where} ({source.kind}) -> {flags.output} ({flags.output_format}): {len(conversion.infos)} weights, "
        f"{conversion.num_bytes / 1e9:.2f} GB, {len(conversion.infos) - len(conversion.fresh)} kept"
    )
    for name in conversion.fresh:
        print(f"fresh: {name} {list(conversion.infos[name].shape)}")
    for name in source.unused:
        print(f"left out, as no forward uses it: {name}")


def convert(flags: ConvertFlags) -> None:
    """Check everything, write the target and report."""
    from tqdm import tqdm

    from megatron_fsvideo.checkpoint.safetensors_shards import parse_size
    from megatron_fsvideo.conversion.convert import plan_conversion, write_target
    from megatron_fsvideo.conversion.source import open_source
    from megatron_fsvideo.parallel import groups
    from megatron_fsvideo.parallel.dtypes import DTYPES

    try_output(flags.output)
    start, max_shard_size = start_job(flags), parse_size(flags.max_shard_size)
    source = open_source(Path(flags.input), flags.input_format, flags.use_ema)
    pgs = groups.initialize(DiTParallelConfig())
    conversion = plan_conversion(source, start, None if flags.dtype == "keep" else DTYPES[flags.dtype], pgs, flags.seed)
    with tqdm(total=len(conversion.infos), desc="converting", unit="weight", disable=None) as bar:
        write_target(conversion, flags.output_format, Path(flags.output), max_shard_size, bar.update)
    groups.shutdown()
    report(conversion, flags)


def main() -> None:
    """Parse the command line and convert."""
    convert(parse_job(ConvertJob).convert)


if __name__ == "__main__":
    run_script(main)
