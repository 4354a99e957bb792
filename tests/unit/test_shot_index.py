"""The shot index: what one process found out, no other decodes again."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import moving_video

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data import shot_index
from megatron_fsvideo.data.clip_dataset import open_clips
from megatron_fsvideo.data.draws import MULTINOMIAL_UP_TO, WeightedDraw
from megatron_fsvideo.data.listing import INDEX_FOLDER
from megatron_fsvideo.data.shot_index import ShotIndex
from megatron_fsvideo.data.shots import find_shots
from megatron_fsvideo.data.video import measure, write_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for k in range(3):
        write_video(folder / f"film{k}.mp4", torch.cat([moving_video(20, 36, 64, 2 * k + s) for s in range(2)]), 8)
    shutil.copy(folder / "film0.mp4", os.fsencode(folder) + b"/caf\xe9.mp4")
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


def index_all(folder: Path, processes: int = 1) -> str:
    """Run the tool as so many processes at once; returns what they print."""
    command = [sys.executable, "tools/index_shots.py", "--video-dir", str(folder)]
    running = []
    for rank in range(processes):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(processes)}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE))
    said = "".join(process.communicate(timeout=1200)[0] for process in running)
    assert not any(process.returncode for process in running)
    return said


def refuse_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(shot_index, "scan_shots", fail)


def test_what_is_indexed_is_not_decoded_again(films, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    assert sum(map(int, (word.split()[1] for word in index_all(folder, 2).splitlines()))) == 5
    data = VideoDataConfig(video_dir=str(folder), num_frames=5, resolution=32, short_side=36, holdout_every=2)
    refuse_to_decode(monkeypatch)
    clips, held_out = open_clips(data, seed=0)
    assert len(clips.shots) == 4 and len(held_out.shots) == 4
    assert "bad.mp4" in capsys.readouterr().err
    path = folder / "film1.mp4"
    index = ShotIndex(folder, folder / INDEX_FOLDER)
    assert index.shots(path) == find_shots(path) and index.info(path) == measure(path).info
    known, found = index.open(path).table, measure(path)
    assert np.array_equal(known.times, found.times) and np.array_equal(known.marks, found.marks)
    assert known.time_base == found.time_base and known.timeline == found.timeline
    assert "0 of this process's 5 videos decoded, 5 were known" in index_all(folder)


def test_a_file_is_known_by_its_content_and_not_by_its_name(films, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(films, folder)
    part = folder / INDEX_FOLDER / "a.jsonl"
    index = ShotIndex(folder)
    for path in sorted(folder.glob("film*")):
        assert index.add(path, part)
    # As a half-written line of a killed process, and one of another program.
    with part.open("ab") as file:
        file.write(b'{"version": 1, "path": "film')
    assert not ShotIndex(folder, part.parent).knows(folder / "bad.mp4")
    ShotIndex(folder).add(folder / "bad.mp4", part)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)  # other times of change, maybe
    os.utime(moved / "film0.mp4", (1, 1))
    shutil.copy(moved / "film2.mp4", moved / "film1.mp4")
    index = ShotIndex(moved, moved / INDEX_FOLDER)
    assert index.knows(moved / "film0.mp4") and index.knows(moved / "bad.mp4")
    assert not index.knows(moved / "film1.mp4")
    assert index.shots(moved / "film1.mp4") == find_shots(moved / "film1.mp4")


def test_draws_by_cumulative_sums_have_the_weights_probabilities():
    weights = np.zeros(MULTINOMIAL_UP_TO + 1, np.int64)
    weights[[3, 70, MULTINOMIAL_UP_TO]] = 1, 2, 5
    draw = WeightedDraw(weights)
    generator = torch.Generator().manual_seed(0)
    counts = np.bincount([draw(generator) for _ in range(4000)], minlength=len(weights))
    assert counts[[3, 70, MULTINOMIAL_UP_TO]].sum() == 4000
    assert counts[[3, 70, MULTINOMIAL_UP_TO]] / 4000 == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)


def test_more_shots_than_torch_can_draw_from():
    draw = WeightedDraw(np.ones((1 << 24) + 10, np.int8))
    generator = torch.Generator().manual_seed(1)
    began = time.process_time()
    drawn = [draw(generator) for _ in range(1000)]
    assert time.process_time() - began < 1 and 0 <= min(drawn) and max(drawn) > 1 << 23


@pytest.mark.slow
def test_a_thousand_files_on_two_processes(tmp_path, monkeypatch):
    folder = tmp_path / "films"
    for k in range(1000):
        write_video(folder / f"{k % 10}" / f"film{k}.mp4", moving_video(18, 32, 48, k), 8)
    index_all(folder, 2)
    assert len(list((folder / INDEX_FOLDER).glob("*.jsonl"))) == 2
    began = time.process_time()
    refuse_to_decode(monkeypatch)
    data = VideoDataConfig(video_dir=str(folder), num_frames=17, resolution=32, short_side=32, cache_gib=0.0)
    clips, _ = open_clips(data, seed=0)
    assert len(clips.shots) == 1000
    print(f"restart: {time.process_time() - began:.2f} CPU s for 1000 files")
