"""Contact sheets: clips as rows of frames under their labels, to be looked at."""

import unicodedata
from pathlib import Path

import numpy as np
import torch
from anyascii import anyascii
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megatron_fsvideo.data.outputs import replacing

GAP = 4
FONT_SIZE = 11
LINE_HEIGHT = 14
MAX_LINES = 3
# A letter that no font has. What looks like it has no glyph in the font.
_UNASSIGNED = "\uffff"


def write_contact_sheet(path: str | Path, rows: list[tuple[str, Tensor]], num_columns: int = 5) -> Tensor:
    """Write a PNG with a labelled row of equally spaced frames per clip, first and last included.

    Args:
        rows: (label, clip uint8 [f, h, w, 3]). Labels are wrapped, and cut after three lines.

    Returns:
        the sheet, uint8 [height, width, 3].

    Raises:
        OutputError: it cannot be written.
    """
    font = ImageFont.load_default(FONT_SIZE)
    strips = [_strip(clip, num_columns) for _, clip in rows]
    width = max(strip.shape[1] for strip in strips)
    labels = [wrap_label(label, font, width) for label, _ in rows]
    height = sum(len(lines) * LINE_HEIGHT + strip.shape[0] + GAP for lines, strip in zip(labels, strips, strict=True))
    sheet = Image.new("RGB", (width + 2 * GAP, height + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for lines, strip in zip(labels, strips, strict=True):
        for line in lines:
            draw.text((GAP, top), line, fill="black", font=font)
            top += LINE_HEIGHT
        sheet.paste(Image.fromarray(strip), (GAP, top))
        top += strip.shape[0] + GAP
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return torch.from_numpy(np.array(sheet))


def wrap_label(label: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A label as one to three lines of at most `width` pixels. The last ends with `...` where more would follow.

    Letters that the font lacks (Chinese, emoji) are spelled in Latin letters.
    """
    lines = [""]
    for word in _spell(label, font).split():
        while word:
            joined = f"{lines[-1]} {word}".lstrip()
            if font.getlength(joined) <= width:
                lines[-1], word = joined, ""
            elif lines[-1]:
                lines.append("")
            else:
                # A word wider than the sheet is broken; at least one letter goes on each line.
                fitting = max(1, sum(font.getlength(word[: k + 1]) <= width for k in range(len(word))))
                lines[-1], word = word[:fitting], word[fitting:]
            if len(lines) > MAX_LINES:
                return [*lines[: MAX_LINES - 1], _shortened(lines[MAX_LINES - 1], font, width)]
    return lines


def _shortened(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def _spell(label: str, font: ImageFont.FreeTypeFont) -> str:
    """A label in letters that the font has."""
    missing = bytes(font.getmask(_UNASSIGNED))
    known: dict[str, str] = {}
    for letter in set(label):
        has_glyph = letter.isspace() or letter.isascii() or bytes(font.getmask(letter)) != missing
        spelled = letter if has_glyph and letter.isprintable() else anyascii(letter)
        known[letter] = f"{spelled} " if unicodedata.east_asian_width(letter) in "WF" else spelled
    return "".join(" " if letter.isspace() else known[letter] for letter in label)


def _strip(clip: Tensor, num_columns: int) -> np.ndarray:
    """[f, h, w, 3] -> chosen frames side by side [h, W, 3]."""
    columns = min(num_columns, len(clip))
    chosen = torch.linspace(0, len(clip) - 1, columns).round().long()
    gap = torch.full((clip.shape[1], GAP, 3), 255, dtype=torch.uint8)
    parts = [part for index in chosen for part in (clip[index], gap)][:-1]
    return torch.cat(parts, dim=1).numpy()
