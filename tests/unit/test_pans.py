"""The quickstart's clips: moves go the way of their captions, and no held-out shot is trained on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from data_fixtures import moving_video

from megatron_fsvideo.data.shots import find_shots, split_shots
from megatron_fsvideo.data.video import read_video, write_video
from megatron_fsvideo.evaluation.motion import pan_direction

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "make_pans.py"


@pytest.fixture(scope="module")
def pans(tmp_path_factory):
    """The folder of clips and the manifest's lines, of a film with five shots."""
    root = tmp_path_factory.mktemp("pans")
    # Strong contrast between shots, and enough detail in them to see a move.
    shots = [moving_video(30, 90, 160, seed) // 2 + 25 * seed for seed in range(5)]
    noise = torch.randint(0, 30, (1, 90, 160, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(root / "films" / "film.mp4", torch.cat(shots) // 2 * 2 + noise, 24, quality=4)
    spec = importlib.util.spec_from_file_location("make_pans", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    argv = ["make_pans.py", "--video-dir", root / "films", "--output-dir", root / "out", "--train-clips", 20,
            "--real-clips", 4, "--heldout-frames", 2, "--holdout-every", 2, "--bucket", "9x32x32", "--travel", 8,
            "--seed", 1]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in argv])
        module.main()
    lines = [json.loads(line) for line in (root / "out" / "manifest.jsonl").read_text().splitlines()]
    return root, lines


def read(root, line):
    return read_video(root / "out" / line["path"], line["start"], line["num_frames"])


def test_counts_and_shapes(pans):
    root, lines = pans
    train = [line for line in lines if line["split"] == "train"]
    assert len(train) == 24 and len(lines) == 24 + 2 * 4
    for direction, count in (("left", 5), ("right", 5), ("up", 5), ("down", 5), ("real", 4)):
        assert sum(line["direction"] == direction for line in train) == count
    assert read(root, lines[3]).shape == (9, 32, 32, 3)


def test_a_clip_moves_the_way_its_caption_says(pans):
    root, lines = pans
    moves = [line for line in lines if line["direction"] != "real"]
    right = [pan_direction(read(root, line), max_shift=10) == line["direction"] for line in moves]
    assert all(right), f"{sum(right)} of {len(right)}"
    assert all(line["direction"] in line["caption"] for line in moves)


def test_a_held_out_first_frame_is_used_for_all_four_moves(pans):
    root, lines = pans
    heldout = [line for line in lines if line["split"] == "heldout"]
    for k in (0, 4):
        assert [line["direction"] for line in heldout[k : k + 4]] == ["left", "right", "up", "down"]
        first = [read(root, line)[0].float() for line in heldout[k : k + 4]]
        assert max((frame - first[0]).abs().mean() for frame in first) < 2


def test_held_out_shots_are_not_trained_on(pans):
    root, lines = pans
    train, heldout = split_shots(find_shots(root / "films" / "film.mp4"), 2)
    assert (len(train), len(heldout)) == (3, 2)
    sources = {split: {line["source"] for line in lines if line["split"] == split} for split in ("train", "heldout")}
    assert sources["train"] <= {shot.name for shot in train}
    assert sources["heldout"] <= {shot.name for shot in heldout}
