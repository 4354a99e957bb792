"""tools/evaluate_fsae.py: what it measures, which clips it takes, what it writes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEConfig, FSAEJob, VideoDataConfig, build_job, to_dict
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.data.video import read_video, resize_and_crop, to_unit, write_video
from megatron_fsvideo.evaluation.autoencoders import OurAutoencoder, check_names
from megatron_fsvideo.evaluation.clips import list_clips, read_clip
from megatron_fsvideo.evaluation.frechet import frechet_distance
from megatron_fsvideo.evaluation.psnr import psnr
from megatron_fsvideo.evaluation.reconstruction import Judges, measure
from megatron_fsvideo.evaluation.report import Row, format_table, notes
from megatron_fsvideo.models.frozen.i3d import I3D
from megatron_fsvideo.models.frozen.perceptual import VGG16Trunk, load_perceptual_loss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.parallel.team import Team
from tests.unit.fsae_fixtures import build, config, count_attention
from tests.unit.judge_fixtures import QuickLogits
from tools.evaluate_fsae import EvaluateFlags, clip_choice, main

JOB = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | {"short_side": 40, "valid_resolution": 40, "holdout_every": 3})
ALONE = Team()


@pytest.fixture
def checkpoint(tmp_path):
    """A --save folder with one checkpoint of the debug autoencoder, random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "run" / "iter_0000010"
    save_fsae(folder / "model", FSAE(JOB.model))
    (folder / "job.json").write_text(json.dumps({"job": to_dict(JOB)}))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10\n")
    return tmp_path / "run"


@pytest.fixture
def films(tmp_path):
    """Two videos of 24 and 20 frames, a short one, a damaged one."""
    folder = tmp_path / "films"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for name, count in (("a", 24), ("b", 20), ("short", 3)):
        still = torch.randint(40, 256, (1, 48, 64, 3), generator=generator, dtype=torch.uint8)
        frames = torch.cat([still.roll(k, dims=2) for k in range(count)])
        write_video(folder / f"{name}.mp4", frames, fps=12)
    (folder / "damaged.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    return folder


def run(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate_fsae.py", *map(str, argv)])
    main()


def test_measures_known_errors():
    video = torch.zeros(1, 3, 5, 16, 16)
    wrong = video.clone()
    wrong[:, :, -1] = 0.2  # 0.1 on [0, 1]: 20 dB
    exact, damaged = measure(video, video, Judges()), measure(video, wrong, Judges())
    assert damaged["last_frame_psnr"] == pytest.approx(20.0, abs=1e-3)
    assert exact["first_frame_psnr"] == pytest.approx(damaged["first_frame_psnr"]) == pytest.approx(80.0)
    assert damaged["psnr"] == pytest.approx((4 * 80 + 20) / 5, abs=1e-3)
    assert exact["ssim"] == pytest.approx(1.0) and damaged["ssim"] < 0.999
    assert "lpips" not in exact


def test_takes_the_clips_that_training_held_out(checkpoint):
    data = clip_choice(EvaluateFlags(load=str(checkpoint), video_dir="films", out="x.json"))
    assert (data.num_frames, data.resolution, data.short_side, data.holdout_every) == (5, 40, 40, 3)
    data = clip_choice(EvaluateFlags(str(checkpoint), "films", "x.json", resolution=32, holdout_every=0))
    assert (data.num_frames, data.resolution, data.short_side, data.holdout_every) == (5, 32, 40, 0)
    data = clip_choice(EvaluateFlags(str(checkpoint), "films", "x.json", sampling="videos"))
    assert data.holdout_every == 0
    with pytest.raises(ValueError, match="leave out --holdout-every 2"):
        clip_choice(EvaluateFlags(str(checkpoint), "films", "x.json", sampling="videos", holdout_every=2))


def test_release_folder_takes_the_papers_clips(tmp_path):
    torch.manual_seed(0)
    save_fsae(tmp_path / "release", FSAE(FSAEConfig(**to_dict(JOB.model))))
    data = clip_choice(EvaluateFlags(load=str(tmp_path / "release"), video_dir="films", out="x.json"))
    assert (data.num_frames, data.resolution, data.short_side) == (17, 256, 256)


def test_videos_are_taken_from_their_beginning(films):
    data = VideoDataConfig(video_dir=str(films), num_frames=17, resolution=32, short_side=40)
    listed = list_clips(data, "videos", 1, ALONE)
    assert listed.clips == (Shot(str(films / "a.mp4"), 0, 17),)
    listed = list_clips(data, "videos", 4, ALONE)
    assert [(Path(clip.path).name, clip.start) for clip in listed.clips] == [
        ("a.mp4", 0),
        ("a.mp4", 7),
        ("b.mp4", 0),
        ("b.mp4", 3),
    ]
    assert sorted(Path(name).name for name in listed.skipped) == ["damaged.mp4", "short.mp4"]
    assert listed.skipped[str(films / "short.mp4")] == "has 3 frames, needs 17"


def test_clips_keep_the_files_frames_and_are_cropped_around_the_centre(films):
    data = VideoDataConfig(video_dir=str(films), num_frames=5, resolution=32, short_side=32)
    clip = read_clip(Shot(str(films / "b.mp4"), 3, 5), data)
    assert torch.equal(clip[0], to_unit(resize_and_crop(read_video(films / "b.mp4", 3, 5), 32, 32)))
    wider = read_clip(Shot(str(films / "b.mp4"), 3, 5), VideoDataConfig(num_frames=5, resolution=32, short_side=48))
    assert torch.equal(wider[0], to_unit(read_video(films / "b.mp4", 3, 5)[:, 8:40, 16:48]))


def test_refuses_a_folder_without_clips(films):
    data = VideoDataConfig(video_dir=str(films), num_frames=41, resolution=32, short_side=40, holdout_every=2)
    with pytest.raises(ValueError, match="--holdout-every 0"):
        list_clips(data, "shots", 4, ALONE)
    with pytest.raises(ValueError, match="none of the 3 videos .* has 41 frames .the longest has 24; 1 files"):
        list_clips(data, "videos", 4, ALONE)


@pytest.mark.parametrize("kind", ("standard", "lite"))
def test_noise_and_first_frame_of_a_decoder(kind):
    fsae = build(config(kind)).float()
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    both = OurAutoencoder(fsae, "folder", "mark", noise_seed=7)
    name = {"standard": "FSAE-Standard", "lite": "FSAE-Lite"}[kind]
    assert both.rows == (name, f"{name}, no noise")
    latents = both.encode(video)
    features, calls = fsae.first_frame_features(video[:, :, :1]), count_attention(fsae)
    noisy, quiet = (both.decode(latents, video, row) for row in both.rows)
    assert calls == {0: 1, 1: 1}, "an attention to the first frame is not called"
    assert torch.equal(noisy, fsae.decode(latents, features, 7))
    silent = build(config(kind, noise_weight=0.0)).float()
    silent.load_state_dict(fsae.state_dict())
    assert torch.equal(quiet, silent.decode(latents, features)) and not torch.equal(noisy, quiet)
    alone = OurAutoencoder(fsae, "folder", "mark", "off", first_frame=False)
    assert alone.rows == (f"{name}, no first frame, no noise",)
    assert torch.equal(alone.decode(latents, video, alone.rows[0]), silent.decode(latents))
    assert OurAutoencoder(fsae, "folder", "mark", "on").rows == (name,)


def test_causal_decoder_has_one_row_and_names_stay_apart():
    fsae = build(config("causal")).float()
    first, second = (OurAutoencoder(fsae, source, "mark") for source in ("one", "two"))
    assert first.rows == ("FSAE (causal)",)
    assert check_names([first, second]) == ["FSAE (causal)", "FSAE (causal) [two]"]
    with pytest.raises(ValueError, match="two is given twice"):
        check_names([first, second, second])
    assert (first.facts.downsample, first.facts.compression) == ("8x8x4", 192)
    with pytest.raises(ValueError, match="multiples of 8, not 20: give --resolution 16 or 24"):
        first.facts.check_clip(5, 20)
    with pytest.raises(ValueError, match="4k.1 frames, not 8: give --num-frames 5 or 9"):
        first.facts.check_clip(8, 16)


def test_table_has_the_papers_columns_and_says_what_is_missing():
    rows = [
        Row("FSAE-Standard", "64x64x4", 384, {"psnr": 28.961, "ssim": 0.8064, "fvd": 256.617}),
        Row("wan (vae)", "8x8x4", 48, {"psnr": 31.73, "ssim": 0.88}),
    ]
    assert format_table(rows).splitlines() == [
        "method        | downsample | compression |  SSIM |  PSNR |    FVD",
        "FSAE-Standard |    64x64x4 |       1:384 | 0.806 | 28.96 | 256.62",
        "wan (vae)     |      8x8x4 |        1:48 | 0.880 | 31.73 |      -",
    ]
    assert notes(Judges(), 1000, 0) == [
        "LPIPS is not measured: give --lpips-path (docs/evaluation.md)",
        "FVD is not measured: give --i3d-path (docs/evaluation.md)",
    ]
    assert "biased upwards" in notes(Judges(i3d=I3D()), 8, 0)[1] and "2 files" in notes(Judges(), 8, 2)[2]


def test_writes_report_statistics_and_sheet(checkpoint, films, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report" / "evaluation.json"
    argv = ["--load", checkpoint, "--video-dir", films, "--out", out, "--holdout-every", "0", "--num-clips", "2"]
    run(monkeypatch, *argv, "--device", "cpu")
    report = json.loads(out.read_text())
    assert report["clips"]["count"] == 2 and len(report["fingerprint"]) == 64
    assert 0 < report["psnr"] < 40
    (row,) = report["table"]
    assert row["values"]["psnr"] == report["psnr"]
    assert report["psnr"] == pytest.approx(sum(clip["psnr"] for clip in row["per_clip"]) / 2, abs=1e-4)
    assert [Path(name).name for name in report["clips"]["skipped"]] == ["damaged.mp4"]
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "LPIPS is not measured" in printed.out and f"{report['psnr']:.2f}" in printed.out
    assert "damaged.mp4" in printed.err

    fsae = FSAE(JOB.model)
    fsae.load_state_dict(safetensors.torch.load_file(checkpoint / "iter_0000010" / "model" / "model.safetensors"))
    fsae.eval().requires_grad_(False)
    data = VideoDataConfig(num_frames=5, resolution=40, short_side=40)
    videos = torch.cat([read_clip(Shot(str(films / f"{name}.mp4"), 0, 5), data) for name in "ab"])
    latents = torch.cat([fsae.encode(video[None]) for video in videos])
    expected = psnr(torch.cat([fsae.decode(z[None]) for z in latents]), videos).mean()
    assert report["psnr"] == pytest.approx(float(expected), abs=1e-3)
    (statistics,) = json.loads(out.with_suffix(".latents.json").read_text())
    assert statistics["fingerprint"] == report["fingerprint"]
    assert statistics["positions"] == latents[:, 0].numel()
    for name, value in (("latent_mean", latents.mean((0, 2, 3, 4))), ("latent_std", latents.std((0, 2, 3, 4)))):
        assert statistics[name] == pytest.approx(value.tolist(), rel=1e-2, abs=1e-4)


def test_lpips_and_fvd_columns(checkpoint, films, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    weights = VGG16Trunk().state_dict()
    weights |= {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate((64, 128, 256, 512, 512))}
    safetensors.torch.save_file(weights, tmp_path / "vgg.safetensors")
    monkeypatch.setattr("megatron_fsvideo.models.frozen.i3d.load_i3d", lambda path, device: QuickLogits())
    out = tmp_path / "evaluation.json"
    argv = ["--load", checkpoint, "--video-dir", films, "--out", out, "--sampling", "videos", "--num-clips", "2"]
    argv += ["--num-frames", "9", "--resolution", "32", "--device", "cpu"]
    run(monkeypatch, *argv, "--lpips-path", tmp_path / "vgg.safetensors", "--i3d-path", "i3d.safetensors")
    values = json.loads(out.read_text())["table"][0]["values"]

    fsae = FSAE(JOB.model)
    fsae.load_state_dict(safetensors.torch.load_file(checkpoint / "iter_0000010" / "model" / "model.safetensors"))
    fsae.eval().requires_grad_(False)
    data = VideoDataConfig(num_frames=9, resolution=32, short_side=40)
    videos = torch.cat([read_clip(Shot(str(films / f"{name}.mp4"), 0, 9), data) for name in "ab"])
    ours = torch.cat([fsae.decode(fsae.encode(video[None])).clamp(-1, 1) for video in videos])
    perceptual = load_perceptual_loss("vgg16", str(tmp_path / "vgg.safetensors"), torch.device("cpu"))
    i3d = QuickLogits()
    assert values["lpips"] == pytest.approx(float(perceptual(ours, videos)), abs=1e-3)
    assert values["fvd"] == pytest.approx(frechet_distance(i3d(ours), i3d(videos)), rel=1e-3)
    assert values["fvd"] > 1
    assert "FVD of 2 clips is biased upwards" in capsys.readouterr().out
    with pytest.raises(ValueError, match="FVD needs clips of at least 9 frames, not 5"):
        run(monkeypatch, *argv[:-6], "--overwrite", "--i3d-path", "i3d.safetensors")
