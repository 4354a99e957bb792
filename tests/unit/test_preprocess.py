"""Preprocessing: restart, any number of processes, reuse by key, refusals, bad videos."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from data_fixtures import (
    CornerImage,
    folder_bytes,
    make_videos,
    moving_video,
    tiny_encoders,
    tiny_options,
    write_manifest,
)

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.data import preprocessing
from megatron_fsvideo.data.clips import Source, expand
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import ShardError, find_manifests, read_json, read_manifest, read_sample
from megatron_fsvideo.data.manifest import VideoEntry, folder_entries, read_manifest_lines, require_captions
from megatron_fsvideo.data.preprocessing import preprocess
from megatron_fsvideo.data.video import read_video, to_unit, write_video
from megatron_fsvideo.models.codecs import CodecIdentity, is_same_encoder
from megatron_fsvideo.models.fsae import FSAE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def entries(tmp_path):
    return make_videos(tmp_path / "videos", 10)


def test_the_dataset_holds_what_the_encoders_give(tmp_path, entries):
    encoders = tiny_encoders(image=CornerImage())
    assert preprocess(tmp_path / "out", entries, encoders, tiny_options(negative_prompt="bad"))
    values = read_json(tmp_path / "out" / "dataset.json")
    assert values["num_samples"] == 10 and values["buckets"] == {"9x32x32": 10} and values["fps"] == 8
    assert len(values["shards"]) == 3
    found = {}
    for path in find_manifests(tmp_path / "out"):
        for entry in read_manifest(path).samples:
            sample = read_sample(path.with_suffix(".tar"), entry)
            found[sample.record["source"]] = sample
    assert sorted(found) == [f"video{k}.mp4" for k in range(10)]
    video = to_unit(read_video(entries[7].path))
    sample = found["video7.mp4"]
    latents = encoders.autoencoder.encode(video[None])[0]
    torch.testing.assert_close(sample.latents.float(), latents, rtol=1e-2, atol=1e-2)
    assert sample.record["caption"] == "clip 7" and sample.text.shape == (6, 5)
    torch.testing.assert_close(sample.image.float(), encoders.image.encode(video[:, 0][None])[0], rtol=1e-2, atol=1e-2)


def test_restart_skips_finished_shards(tmp_path, entries):
    done, rest = tmp_path / "whole", tmp_path / "restarted"
    preprocess(done, entries, tiny_encoders(), tiny_options())
    preprocess(rest, entries, tiny_encoders(), tiny_options(), rank=1, world_size=3)
    assert not (rest / "dataset.json").exists() and len(find_manifests(rest)) == 1
    encoders = tiny_encoders()
    assert preprocess(rest, entries, encoders, tiny_options())
    assert encoders.autoencoder.encoded_clips == 6
    assert folder_bytes(rest) == folder_bytes(done)
    again = tiny_encoders()
    assert preprocess(rest, entries, again, tiny_options()) and again.autoencoder.encoded_clips == 0
    assert folder_bytes(rest) == folder_bytes(done)


def test_two_processes_make_what_one_makes(tmp_path, entries):
    one, two = tmp_path / "one", tmp_path / "two"
    assert preprocess(one, entries, tiny_encoders(), tiny_options())
    complete = [preprocess(two, entries, tiny_encoders(), tiny_options(), rank, 2) for rank in (1, 0)]
    assert complete == [False, True]
    assert folder_bytes(one) == folder_bytes(two)


def test_new_captions_encode_only_text(tmp_path, entries):
    preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options())
    before = {path.stem for path in find_manifests(tmp_path / "out")}
    encoders = tiny_encoders()
    changed = [replace(entries[0], caption="new"), *entries[1:]]
    preprocess(tmp_path / "out", changed, encoders, tiny_options())
    assert encoders.autoencoder.encoded_clips == 0
    assert [text for text in encoders.text.encoded if text] == ["new"]
    # One shard was replaced, and the old one removed.
    assert len(before & {path.stem for path in find_manifests(tmp_path / "out")}) == 2
    assert len(find_manifests(tmp_path / "out")) == 3
    dataset = LatentDataset([str(tmp_path / "out")])
    assert sorted(dataset.read(0, k).record["caption"] for k in range(10))[-1] == "new"


def test_more_videos_encode_only_the_new(tmp_path, entries):
    preprocess(tmp_path / "out", entries[:7], tiny_encoders(), tiny_options())
    encoders = tiny_encoders()
    preprocess(tmp_path / "out", entries, encoders, tiny_options())
    assert encoders.autoencoder.encoded_clips == 3


def test_another_autoencoder_is_refused_and_nothing_changes(tmp_path, entries):
    preprocess(tmp_path / "out", entries, tiny_encoders(0), tiny_options())
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(ShardError, match="stale cache: its latents were made by autoencoder 000000000000, this one"):
        preprocess(tmp_path / "out", entries, tiny_encoders(1), tiny_options())
    assert folder_bytes(tmp_path / "out") == before


def test_another_decoder_of_the_encoder_goes_on(tmp_path, entries):
    preprocess(tmp_path / "out", entries[:7], tiny_encoders(), tiny_options())
    other = tiny_encoders()
    other.autoencoder.identity = CodecIdentity(other.autoencoder.identity.encoder, "f" * 64)
    assert preprocess(tmp_path / "out", entries, other, tiny_options()) and other.autoencoder.encoded_clips == 3


def test_a_folder_that_knows_the_autoencoder_by_all_its_weights_goes_on(tmp_path, entries):
    """As earlier versions wrote them."""
    folder, weights = tmp_path / "out", tiny_encoders().autoencoder.identity.weights
    old = tiny_encoders()
    old.autoencoder.identity = CodecIdentity(weights, weights)
    preprocess(folder, entries[:7], old, tiny_options())
    values = read_json(folder / "dataset.json")
    del values["autoencoder"]["encoder_fingerprint"], values["autoencoder"]["weights_fingerprint"]
    (folder / "dataset.json").write_text(json.dumps(values))
    new = tiny_encoders()
    assert preprocess(folder, entries, new, tiny_options()) and new.autoencoder.encoded_clips == 3
    record = LatentDataset([str(folder)]).description()["autoencoder"]
    assert record["fingerprint"] == weights and is_same_encoder(record, new.autoencoder.identity.record())
    assert is_same_encoder(record, values["autoencoder"])


def test_a_corrupt_shard_is_refused_and_nothing_changes(tmp_path, entries):
    preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options())
    tar = next((tmp_path / "out" / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:999])
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(ShardError, match=r"corrupt shard: 999 bytes, its manifest says \d+"):
        preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options())
    assert folder_bytes(tmp_path / "out") == before


def test_a_bad_video_is_skipped_counted_and_named(tmp_path, entries, caplog):
    whole = (tmp_path / "videos" / "video4.mp4").read_bytes()
    (tmp_path / "videos" / "video4.mp4").write_bytes(whole[: len(whole) // 2])
    assert preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.1))
    values = read_json(tmp_path / "out" / "dataset.json")
    assert values["num_samples"] == 9
    ((name, reason),) = values["skipped"]
    assert name == "video4.mp4:0-9" and "video4.mp4" in reason and "video4.mp4" in caplog.text


def test_one_bad_video_among_three_stops_no_run(tmp_path, entries):
    (tmp_path / "videos" / "video1.mp4").write_bytes(b"damaged")
    assert preprocess(tmp_path / "out", entries[:3], tiny_encoders(), tiny_options(max_bad_fraction=0.01))
    with pytest.raises(ValueError, match=r"1 of 3 videos cannot be read, more than --max-bad-fraction 0; "):
        preprocess(tmp_path / "none", entries[:3], tiny_encoders(), tiny_options(max_bad_fraction=0))


def test_a_bad_file_of_many_entries_is_opened_once(tmp_path, entries, monkeypatch):
    opened = []
    source = preprocessing.Source
    monkeypatch.setattr(preprocessing, "Source", lambda entry: opened.append(entry.path) or source(entry))
    (tmp_path / "videos" / "video1.mp4").write_bytes(b"damaged")
    ranges = [replace(entries[1], start=k, num_frames=1) for k in range(5)]
    assert preprocess(tmp_path / "out", [entries[0], *ranges], tiny_encoders(), tiny_options(max_bad_fraction=0.9))
    assert opened.count(entries[1].path) == 2  # once a shard, of which there are two


def test_too_many_bad_videos_stop_the_run(tmp_path, entries):
    for k in (4, 8):
        (tmp_path / "videos" / f"video{k}.mp4").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"2 of 10 videos cannot be read, more than --max-bad-fraction 0.1; .*video8"):
        preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.1))
    assert not (tmp_path / "out" / "dataset.json").exists()
    # Two processes see one bad video each: the count is checked again over all.
    for rank in (0, 1):
        if rank == 1:
            with pytest.raises(ValueError, match="2 of 10 videos"):
                preprocess(tmp_path / "two", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.1), rank, 2)
        else:
            preprocess(tmp_path / "two", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.2), rank, 2)


@pytest.mark.parametrize("name", ["truncated", "resolution changes", "a folder", "gone"])
def test_a_bad_item_among_others_costs_only_itself(name, tmp_path, entries):
    bad = Path(entries[3].path)
    if name == "truncated":
        bad.write_bytes(bad.read_bytes()[:-300])
    elif name == "resolution changes":
        streams = [raw_h264(tmp_path / f"{side}.h264", side) for side in (32, 48)]
        bad.write_bytes(b"".join(streams))
    else:
        bad.unlink()
        if name == "a folder":
            bad.mkdir()
    assert preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.1))
    values = read_json(tmp_path / "out" / "dataset.json")
    assert values["num_samples"] == 9 and [skipped[0] for skipped in values["skipped"]] == ["video3.mp4:0-9"]
    assert "video3.mp4" in values["skipped"][0][1]


def raw_h264(path: Path, side: int) -> bytes:
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for frame in moving_video(9, side, side).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_film_of_twice_the_length_needs_the_same_memory(tmp_path):
    for repeats in (3, 6):
        parts = [moving_video(40, 256, 320, seed) for seed in range(4)] * repeats
        write_video(tmp_path / str(repeats) / "film.mp4", torch.cat(parts), 8)
    growth = []
    for repeats in (3, 6):
        # A process each: what an earlier run has freed would serve the next.
        code = (
            "import sys; sys.path.insert(0, 'tests/unit')\n"
            "import torch; torch.set_num_threads(1)\n"
            "from data_fixtures import tiny_encoders, tiny_options\n"
            "from pathlib import Path\n"
            "from megatron_fsvideo.data.manifest import folder_entries\n"
            "from megatron_fsvideo.data.preprocessing import preprocess\n"
            f"folder = Path({str(tmp_path / str(repeats))!r})\n"
            "rss = lambda key: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))\n"
            "before = rss('VmRSS')\n"
            "options = tiny_options('9x256x320', batch_size=2)\n"
            "assert preprocess(folder / 'out', folder_entries(folder), tiny_encoders(), options)\n"
            "print(before, rss('VmHWM'))\n"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        before, peak = map(int, result.stdout.split())
        growth.append((peak, peak - before))
    (short, _), (long, grown) = growth
    assert long / short < 1.05, growth
    # The long film's frames would take 236 MB.
    assert grown < 150_000, growth


def test_sizes_the_autoencoder_cannot_divide_are_refused_first(tmp_path, entries):
    with pytest.raises(ValueError, match="bucket 9x30x32: height 30 is not a multiple .* 4; try 28 or 32"):
        preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options("9x30x32"))
    assert not (tmp_path / "out").exists()


def test_text_less_samples_are_refused(tmp_path, entries):
    require_captions(entries)
    manifest = write_manifest(tmp_path / "videos" / "m.jsonl", [*entries[:4], replace(entries[4], caption=" ")])
    with pytest.raises(ValueError, match="1 of 5 videos have no caption, the first is .*video4.mp4:0-9: .*none"):
        require_captions(read_manifest_lines(manifest))


def test_manifest_errors_name_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "a.mp4"}\n{"caption": "b"}\n')
    with pytest.raises(ValueError, match="m.jsonl line 2"):
        read_manifest_lines(path)
    path.write_text('{"path": "a.mp4", "start": 3}\n')
    with pytest.raises(ValueError, match="line 1: has start but no num_frames"):
        read_manifest_lines(path)
    path.write_text('{"path": "a.mp4", "split": "train"}\n')
    with pytest.raises(ValueError, match="no line with split 'test'"):
        read_manifest_lines(path, "test")
    with pytest.raises(ValueError, match="does not exist"):
        read_manifest_lines(tmp_path / "none.jsonl")


def test_whole_files_become_clips_inside_shots(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, torch.cat([moving_video(n, 32, 32, seed) for n, seed in ((20, 1), (5, 2), (12, 3))]), 8)
    (tmp_path / "a.txt").write_text("two\nscenes")
    (entry,) = folder_entries(tmp_path)
    assert entry == VideoEntry(str(path), "a.mp4", "two scenes")
    source = Source(entry)
    clips = expand(entry, source, tiny_options("9x32x32", "5x32x32").clips)
    # 9 + 9 of the first 20 frames, 5 of 5, 9 of the last 12.
    assert [(clip.start, clip.bucket.num_frames) for clip in clips] == [(0, 9), (9, 9), (20, 5), (25, 9)]
    halved = replace(tiny_options("9x32x32").clips, fps=4.0)
    assert [(clip.start, clip.fps) for clip in expand(entry, source, halved)] == [(0, 4.0)]
    with pytest.raises(ValueError, match=re.escape("a.mp4: 20 frames make 3 at 1 frames per second, the shortest")):
        expand(entry, source, replace(halved, fps=1.0))


def test_many_clips_in_one_file(tmp_path):
    path = tmp_path / "many.mp4"
    scenes = [moving_video(9, 32, 32, seed) for seed in range(12)]
    write_video(path, torch.cat(scenes), 8, quality=6, full_color=True, keyframe_interval=9)
    entries = [VideoEntry(str(path), "many.mp4", f"scene {k}", 9 * k, 9) for k in range(12)]
    encoders = tiny_encoders()
    preprocess(tmp_path / "out", entries, encoders, tiny_options())
    dataset = LatentDataset([str(tmp_path / "out")])
    for k in range(12):
        sample = dataset.read(0, k)
        scene = scenes[int(sample.record["caption"].split()[1])]
        expected = encoders.autoencoder.encode(to_unit(scene)[None])[0]
        assert (sample.latents.float() - expected).square().mean() < 0.02 * expected.square().mean()


# ---- the tool itself, with a real (tiny, random) autoencoder


@pytest.fixture(scope="module")
def fsae(tmp_path_factory):
    """A release folder of an autoencoder with spatial factor 4."""
    torch.manual_seed(0)
    config = FSAEConfig(
        widths=(8, 16, 16),
        encoder_depths=(0, 1, 1),
        decoder_depths=(0, 1, 1),
        attention_stages=1,
        latent_channels=4,
        attention_head_dim=8,
    )
    folder = tmp_path_factory.mktemp("fsae") / "release"
    save_fsae(folder, FSAE(config))
    return folder


def load_tool():
    """The tool as a module, for tests that need no process of its own."""
    spec = importlib.util.spec_from_file_location("preprocess_latents", ROOT / "tools" / "preprocess_latents.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and inspect look for the source of the flags.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_tool(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run tools/preprocess_latents.py as a user does."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(ROOT / "tools" / "preprocess_latents.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_tool_with_two_processes_equals_one(tmp_path, entries, fsae):
    manifest = write_manifest(tmp_path / "videos" / "m.jsonl", entries)
    for name, processes in (("one", 1), ("two", 2)):
        result = run_tool(
            "--manifest", manifest, "--fsae", fsae, "--output", tmp_path / name, "--buckets", "9x32x32",
            "--samples-per-shard", "4", "--dtype", "fp32", processes=processes,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "complete" in result.stderr
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert len(LatentDataset([str(tmp_path / "two")])) == 10


BAD_INPUT = {
    "frames": (["--buckets", "10x32x32"], "a clip of 10 frames: the count must be 4k+1; try 9 or 13"),
    "size": (["--buckets", "9x30x32"], "height 30 is not a multiple of the autoencoder's spatial factor 4; try 28"),
    "text": (["--buckets", "9x32x32", "--text-encoder", "minilm"], "1 of 1 videos have no caption"),
    "autoencoder": (["--buckets", "9x32x32", "--fsae", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_tool_refuses_bad_input_with_one_line(tmp_path, fsae, case, monkeypatch):
    flags, message = BAD_INPUT[case]
    write_video(tmp_path / "videos" / "a.mp4", moving_video(9, 32, 32), 8)
    base = {"--video-dir": tmp_path / "videos", "--fsae": fsae, "--output": tmp_path / "out"}
    given = base | dict(zip(flags[::2], flags[1::2], strict=True))
    monkeypatch.setattr(sys, "argv", ["preprocess_latents.py", *(str(x) for pair in given.items() for x in pair)])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_tool().main()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tool_ends_with_an_error_code_on_a_truncated_video_and_a_corrupt_shard(tmp_path, entries, fsae):
    manifest = write_manifest(tmp_path / "videos" / "m.jsonl", entries)
    arguments = ("--manifest", manifest, "--fsae", fsae, "--output", tmp_path / "out", "--buckets", "9x32x32")
    video = tmp_path / "videos" / "video4.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 2])
    result = run_tool(*arguments, "--max-bad-fraction", "0")
    assert result.returncode == 1 and not (tmp_path / "out" / "dataset.json").exists()
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 10 videos cannot be read, more than --max-bad-fraction 0.0; the last: ")
    assert "video4.mp4" in last
    video.write_bytes(whole)
    assert run_tool(*arguments).returncode == 0
    tar = next((tmp_path / "out" / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:999])
    before = folder_bytes(tmp_path / "out")
    result = run_tool(*arguments)
    assert result.returncode == 1 and folder_bytes(tmp_path / "out") == before
    assert "corrupt shard: 999 bytes" in result.stderr.strip().splitlines()[-1]


def test_equal_files_with_equal_captions_are_encoded_once(tmp_path, caplog):
    entries = make_videos(tmp_path / "videos", 2)
    twin = tmp_path / "videos" / "twin.mp4"
    twin.write_bytes(Path(entries[0].path).read_bytes())
    entries += [replace(entries[0], path=str(twin), source="twin.mp4")]
    entries += [replace(entries[0], path=str(twin), source="twin.mp4", caption="another caption")]
    assert preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options())
    assert "1 entries are equal to others, captions included, and left out; the first: " in caplog.text
    assert len(LatentDataset([str(tmp_path / "out")])) == 3


def test_entries_with_a_problem_are_skipped_counted_and_named(tmp_path):
    entries = make_videos(tmp_path / "videos", 3)
    entries.append(VideoEntry("", "caf\\udce9.mp4", "", problem="caf\\udce9.mp4: the file name is not UTF-8"))
    with pytest.raises(ValueError, match="1 of 4 videos cannot be read, .*the file name is not UTF-8"):
        preprocess(tmp_path / "strict", entries, tiny_encoders(), tiny_options(max_bad_fraction=0))
    assert preprocess(tmp_path / "out", entries, tiny_encoders(), tiny_options(max_bad_fraction=0.5))
    description = read_json(tmp_path / "out" / "dataset.json")
    assert description["num_samples"] == 3 and "not UTF-8" in description["skipped"][0][1]


def test_files_of_others_in_the_shard_folder_are_kept(tmp_path):
    shards = tmp_path / "out" / "shards"
    shards.mkdir(parents=True)
    stale = ["000009-0123456789abcdef.tar", ".1.0123456789ab.tmp"]
    kept = ["film.mp4", "notes.txt", "my.tar", ".hidden"]
    for name in stale + kept:
        (shards / name).touch()
    assert preprocess(tmp_path / "out", make_videos(tmp_path / "videos", 1), tiny_encoders(), tiny_options())
    assert [name for name in stale + kept if (shards / name).exists()] == kept
