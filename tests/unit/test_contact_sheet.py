"""Labels of contact sheets: letters that the font lacks are spelled, long labels are wrapped and cut."""

import numpy as np
import torch
from PIL import Image, ImageFont

from megatron_fsvideo.data.contact_sheet import GAP, LINE_HEIGHT, wrap_label, write_contact_sheet

FONT = ImageFont.load_default(11)


def test_letters_that_the_font_lacks_are_spelled():
    assert wrap_label("左へ привет 😀 pan", FONT, 1000) == ["Zuo he privet :grinning: pan"]
    assert wrap_label("plain, 100%", FONT, 1000) == ["plain, 100%"]


def test_labels_are_wrapped_and_cut():
    lines = wrap_label("the camera pans left " * 30, FONT, 200)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(FONT.getlength(line) <= 200 for line in lines)
    assert " ".join(wrap_label("the camera pans left", FONT, 60)) == "the camera pans left"
    assert len(wrap_label("x" * 500, FONT, 200)) == 3


def test_rows_keep_apart(tmp_path):
    grey = torch.full((2, 20, 30, 3), 90, dtype=torch.uint8)
    sheet = write_contact_sheet(tmp_path / "a.png", [("long label " * 20, grey), ("b", grey)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), sheet)
    assert sheet.shape == (3 * LINE_HEIGHT + LINE_HEIGHT + 2 * (20 + GAP) + GAP, 64 + 2 * GAP, 3)
    # Nothing of the labels lies on the frames.
    rows = (sheet[:, GAP] == 90).all(1)
    assert rows.sum() == 40 and (sheet[rows][:, GAP : GAP + 30] == 90).all()
