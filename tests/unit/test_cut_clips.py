"""Films become manifest lines that preprocessing takes, without a film being written anew."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from data_fixtures import moving_video, tiny_encoders, tiny_options

from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.manifest import read_manifest_lines
from megatron_fsvideo.data.preprocessing import preprocess
from megatron_fsvideo.data.video import write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two films: shots of 20 and 21 frames with a caption, and one of 17 without."""
    folder = tmp_path_factory.mktemp("own") / "films"
    folder.mkdir()
    shots = [moving_video(20, 36, 64, seed=0), moving_video(21, 36, 64, seed=2)]
    write_video(folder / "a.mp4", torch.cat(shots), 8)
    (folder / "a.txt").write_text("a boat\n")
    write_video(folder / "b.mp4", moving_video(17, 36, 64, seed=4), 8)
    return folder


@pytest.fixture
def cut(monkeypatch):
    """Runs the tool."""
    spec = importlib.util.spec_from_file_location("cut_clips", ROOT / "tools/cut_clips.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cut_clips", module)
    spec.loader.exec_module(module)

    def run(*words) -> None:
        monkeypatch.setattr(sys, "argv", ["cut_clips.py", *map(str, words)])
        module.main()

    return run


def test_clips_lie_inside_shots_and_are_encoded(films, cut, tmp_path, capsys):
    manifest = films.parent / "clips.jsonl"
    cut("--video-dir", films, "--output", manifest, "--num-frames", 9, "--overwrite")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(line["path"], line["start"]) for line in lines] == [
        ("films/a.mp4", 0), ("films/a.mp4", 9), ("films/a.mp4", 20), ("films/a.mp4", 29), ("films/b.mp4", 0),
    ]  # fmt: skip
    assert {line["caption"] for line in lines} == {"a boat", ""} and lines[0]["num_frames"] == 9
    assert "5 clips (0 of them valid) of 3 shots of 2 films" in capsys.readouterr().out
    preprocess(tmp_path / "latents", read_manifest_lines(manifest), tiny_encoders(), tiny_options())
    assert len(LatentDataset([str(tmp_path / "latents")])) == 5


def test_films_and_captions_come_from_a_table(films, cut, tmp_path):
    """CSV and Parquet; whole shots are held out."""
    import pyarrow
    import pyarrow.parquet

    table = films.parent / "films.csv"
    table.write_text("video,text\nfilms/a.mp4,eins\nfilms/b.mp4,zwei\n")
    columns = {"file_name": ["films/a.mp4", "films/b.mp4"], "caption": ["eins", "zwei"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), films.parent / "films.parquet")
    found = []
    for name in ("films.csv", "films.parquet"):
        output = tmp_path / f"{name}.jsonl"
        flags = ("--num-frames", 9, "--max-clips-per-shot", 1, "--holdout-every", 2)
        cut("--manifest", films.parent / name, "--output", output, *flags)
        found.append([(e.caption, e.start) for split in ("train", "valid") for e in read_manifest_lines(output, split)])
        assert Path(read_manifest_lines(output, "valid")[0].path).is_file()
    assert found[0] == found[1] == [("eins", 0), ("zwei", 0), ("eins", 20)]


def test_what_cannot_be_cut_is_refused(films, cut, tmp_path):
    output = tmp_path / "clips.jsonl"
    with pytest.raises(ValueError, match="no shot has 22 frames: 3 shots, the longest has 21"):
        cut("--video-dir", films, "--output", output, "--num-frames", 22)
    with pytest.raises(ValueError, match="give --video-dir or --manifest"):
        cut("--output", output, "--num-frames", 9)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"path": str(films / "a.mp4"), "start": 0, "num_frames": 9}) + "\n")
    with pytest.raises(ValueError, match="is a clip already"):
        cut("--manifest", own, "--output", output, "--num-frames", 9)
    with pytest.raises(ValueError, match="is both read"):
        cut("--manifest", own, "--output", own, "--num-frames", 9, "--overwrite")
    assert not output.exists()
