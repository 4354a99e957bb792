"""The table of an evaluation, with Table 2's columns in Table 2's order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fsvideo.evaluation.reconstruction import Judges

COLUMNS = {"ssim": ("SSIM", 3), "psnr": ("PSNR", 2), "lpips": ("LPIPS", 3), "perceptual": ("VGG16*", 3)} | {
    "fvd": ("FVD", 2)
}
"""Name in JSON -> heading and decimals."""


@dataclass(frozen=True)
class Row:
    """One way to decode one autoencoder's latents.

    Attributes:
        downsample: such as 64x64x4.
        compression: 384 for 1:384.
        values: by name; those of COLUMNS are shown.
        per_clip: the values of each clip, without FVD.
    """

    name: str
    downsample: str
    compression: float
    values: Mapping[str, float]
    per_clip: Sequence[Mapping[str, float]] = ()


def format_table(rows: Sequence[Row]) -> str:
    """Lines of equal width; a column that no row has is left out."""
    shown = [name for name in COLUMNS if any(name in row.values for row in rows)]
    lines = [["method", "downsample", "compression", *(COLUMNS[name][0] for name in shown)]]
    for row in rows:
        values = [f"{row.values[name]:.{COLUMNS[name][1]}f}" if name in row.values else "-" for name in shown]
        lines.append([row.name, row.downsample, f"1:{row.compression:g}", *values])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        " | ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def notes(judges: Judges, num_clips: int, skipped: int, num_features: int = 400) -> list[str]:
    """Notes for the reader of the table: missing columns, substitutes, too few clips, files left out."""
    lines = []
    if judges.perceptual is None:
        lines.append("LPIPS is not measured: give --lpips-path (docs/evaluation.md)")
    elif judges.perceptual_key != "lpips":
        lines.append(f"VGG16* is {judges.perceptual.label}: LPIPS's lin weights are missing (--lpips-linear-path)")
    if judges.i3d is None:
        lines.append("FVD is not measured: give --i3d-path (docs/evaluation.md)")
    elif num_clips < 2:
        lines.append("FVD is not measured: it needs at least 2 clips")
    elif num_clips <= num_features:
        lines.append(
            f"FVD of {num_clips} clips is biased upwards (the covariance of {num_features} logits is singular); "
            "Table 2 has 1000"
        )
    if skipped:
        lines.append(f"{skipped} files or clips were skipped; the JSON names them")
    return lines
