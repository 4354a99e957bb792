"""Contact sheets: clips as rows of frames, to be looked at."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

GAP = 4
LABEL_HEIGHT = 16


def write_contact_sheet(path: str | Path, rows: list[tuple[str, Tensor]], num_columns: int = 5) -> Tensor:
    """Write a PNG with a labelled row of equally spaced frames per clip, first and last included.

    Args:
        rows: (label, clip uint8 [f, h, w, 3]).

    Returns:
        the sheet, uint8 [height, width, 3].
    """
    strips = [_strip(clip, num_columns) for _, clip in rows]
    width = max(strip.shape[1] for strip in strips)
    height = sum(LABEL_HEIGHT + strip.shape[0] + GAP for strip in strips)
    sheet = Image.new("RGB", (width + 2 * GAP, height + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for (label, _), strip in zip(rows, strips, strict=True):
        draw.text((GAP, top), label, fill="black")
        sheet.paste(Image.fromarray(strip), (GAP, top + LABEL_HEIGHT))
        top += LABEL_HEIGHT + strip.shape[0] + GAP
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return torch.from_numpy(np.array(sheet))


def _strip(clip: Tensor, num_columns: int) -> np.ndarray:
    """[f, h, w, 3] -> chosen frames side by side [h, W, 3]."""
    columns = min(num_columns, len(clip))
    chosen = torch.linspace(0, len(clip) - 1, columns).round().long()
    gap = torch.full((clip.shape[1], GAP, 3), 255, dtype=torch.uint8)
    parts = [part for index in chosen for part in (clip[index], gap)][:-1]
    return torch.cat(parts, dim=1).numpy()
