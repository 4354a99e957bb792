"""tools/evaluate_fsae.py: what it measures, which clips it takes, what it writes."""

import json

import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEConfig, FSAEJob, build_job, to_dict
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.models.fsae import FSAE
from tools.evaluate_fsae import EvaluateFlags, clip_choice, main, measure, sheet_rows

JOB = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | {"short_side": 40, "valid_resolution": 40, "holdout_every": 3})


@pytest.fixture
def checkpoint(tmp_path):
    """A --save folder with one checkpoint of the debug autoencoder, random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "run" / "iter_0000010"
    save_fsae(folder / "model", FSAE(JOB.model))
    (folder / "job.json").write_text(json.dumps({"job": to_dict(JOB)}))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("10\n")
    return tmp_path / "run"


def test_measures_known_errors():
    videos = torch.zeros(2, 3, 5, 16, 16)
    wrong = videos.clone()
    wrong[1, :, -1] = 0.2  # 0.1 on [0, 1]: 20 dB
    report = measure(videos, wrong)
    exact, damaged = report["per_clip"]
    assert damaged["last_frame_psnr"] == pytest.approx(20.0, abs=1e-3)
    assert exact["first_frame_psnr"] == damaged["first_frame_psnr"] == 80.0
    assert damaged["psnr"] == pytest.approx((4 * 80 + 20) / 5, abs=1e-3)
    assert exact["ssim"] == 1.0 and damaged["ssim"] < 1.0
    assert report["psnr"] == pytest.approx((exact["psnr"] + damaged["psnr"]) / 2, abs=1e-3)


def test_takes_the_clips_that_training_held_out(checkpoint):
    data = clip_choice(EvaluateFlags(load=str(checkpoint), video_dir="films", out="x.json"))
    assert (data.num_frames, data.resolution, data.short_side, data.holdout_every) == (5, 40, 40, 3)
    data = clip_choice(EvaluateFlags(str(checkpoint), "films", "x.json", resolution=32, holdout_every=0))
    assert (data.num_frames, data.resolution, data.short_side, data.holdout_every) == (5, 32, 40, 0)


def test_sheet_shows_pairs_spread_over_all_clips():
    rows = sheet_rows(torch.zeros(5, 3, 1, 8, 8), torch.ones(5, 3, 1, 8, 8), num_shown=3)
    assert [label for label, _ in rows[::2]] == ["original, clip 0", "original, clip 2", "original, clip 4"]
    assert rows[0][1].unique().item() == 128 and rows[1][1].unique().item() == 255


def test_writes_report_and_sheet(checkpoint, tmp_path, monkeypatch):
    films = tmp_path / "films"
    films.mkdir()
    generator = torch.Generator().manual_seed(1)
    still = torch.randint(40, 256, (1, 48, 64, 3), generator=generator, dtype=torch.uint8)
    write_video(films / "a.mp4", still.repeat(24, 1, 1, 1), fps=12)
    out = tmp_path / "report" / "evaluation.json"
    argv = ["evaluate_fsae.py", "--load", str(checkpoint), "--video-dir", str(films), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*argv, "--holdout-every", "0", "--num-clips", "2"])
    main()
    report = json.loads(out.read_text())
    assert report["clips"]["count"] == 2 and len(report["fingerprint"]) == 64
    assert 0 < report["psnr"] < 40
    assert out.with_suffix(".png").stat().st_size > 1000


def test_release_folder_takes_the_papers_clips(tmp_path):
    torch.manual_seed(0)
    save_fsae(tmp_path / "release", FSAE(FSAEConfig(**to_dict(JOB.model))))
    data = clip_choice(EvaluateFlags(load=str(tmp_path / "release"), video_dir="films", out="x.json"))
    assert (data.num_frames, data.resolution) == (17, 256)
