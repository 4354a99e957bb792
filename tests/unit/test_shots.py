"""Shot detection on made sequences, and the split."""

import numpy as np
import pytest
import torch
from data_fixtures import moving_video, solid

from megatron_fsvideo.data.shots import Shot, detect_shots, find_shots, split_shots
from megatron_fsvideo.data.video import write_video


def test_cuts_between_scenes():
    scenes = [moving_video(n, 36, 64, seed).numpy() for n, seed in ((30, 1), (20, 2), (25, 3))]
    assert detect_shots(np.concatenate(scenes)) == [(0, 30), (30, 50), (50, 75)]


def test_motion_is_no_cut():
    assert detect_shots(moving_video(60, 36, 64).numpy()) == [(0, 60)]
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (36, 64, 3), dtype=np.uint8) for _ in range(20)]
    assert detect_shots(noise) == [(0, 20)]


def test_fade_through_black_ends_a_shot():
    scene = moving_video(10, 36, 64, 4).numpy()
    faded = [(scene[-1] * level).astype(np.uint8) for level in np.linspace(1, 0, 12)]
    frames = [*scene, *faded, *solid((0, 0, 0), 3), *faded[::-1]]
    shots = detect_shots(frames)
    assert len(shots) == 2
    assert shots[0][0] == 0 and shots[0][1] <= 22 and shots[1][0] >= 25 and shots[1][1] == len(frames)


def test_nothing_but_black():
    assert detect_shots(solid((0, 0, 0), 5)) == []


def test_find_shots_in_a_file_drops_short_ones(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, torch.cat([moving_video(n, 36, 64, seed) for n, seed in ((20, 1), (5, 2), (18, 3))]), 8)
    assert find_shots(path, min_frames=1) == [
        Shot(str(path), 0, 20),
        Shot(str(path), 20, 5),
        Shot(str(path), 25, 18),
    ]
    assert [shot.num_frames for shot in find_shots(path)] == [20, 18]


def test_split_is_disjoint_complete_and_independent_of_order():
    shots = [Shot(path, 10 * k, 10) for path in ("a", "b") for k in range(7)]
    train, held_out = split_shots(shots, 3)
    assert sorted(train + held_out) == shots
    assert held_out == [Shot(path, start, 10) for path in ("a", "b") for start in (20, 50)]
    assert split_shots(shots[::-1], 3) == (train, held_out)
    assert split_shots(shots, 0) == (shots, [])


def test_split_holds_out_whole_files_of_those_with_few_shots():
    clips = [Shot(f"clip{k}", 0, 20) for k in range(6)]
    film = [Shot("film", 20 * k, 20) for k in range(4)]
    pair = [Shot("pair", 0, 20), Shot("pair", 20, 20)]
    train, held_out = split_shots([*film, *clips, *pair], 3)
    # The third and the sixth clip; of the film, which has enough shots, its third.
    assert held_out == [clips[2], clips[5], film[2]]
    assert sorted(train + held_out) == sorted([*film, *clips, *pair])
    assert split_shots([*pair, *clips[:2]], 3)[1] == pair


def test_split_refuses_to_hold_out_everything():
    with pytest.raises(ValueError, match="holdout_every must be 0 .* got 1"):
        split_shots([], 1)
