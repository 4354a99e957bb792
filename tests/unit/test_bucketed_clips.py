"""Clips in aspect-ratio buckets: who serves which, shapes, draws by number, batch sizes by size of the clip."""

from pathlib import Path

import pytest
import torch
from data_fixtures import random_batch

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, VideoDataConfig, build_job
from megatron_fsvideo.data.bucketed_clips import BucketedClips, open_bucketed_clips
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.tasks.fsae.batches import FSAEBatches

WIDE, TALL, IMAGE, LONG = (Bucket.parse(text) for text in ("5x24x40", "5x40x24", "1x32x32", "21x32x32"))


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide red film, a tall green one, and a longer square blue one."""
    folder = tmp_path_factory.mktemp("videos")
    for channel, (name, size, count) in enumerate(
        (("wide", (36, 64), 18), ("tall", (64, 36), 18), ("square", (48, 48), 24))
    ):
        generator = torch.Generator().manual_seed(channel)
        frames = torch.randint(0, 60, (1, *size, 3), generator=generator).repeat(count, 1, 1, 1)
        frames[..., channel] += 150
        write_video(folder / f"{name}.mp4", frames.to(torch.uint8), fps=25)
    return folder


def test_a_shot_serves_the_nearest_ratio_of_each_length(video_dir: Path, capsys: pytest.CaptureFixture) -> None:
    data = VideoDataConfig(video_dir=str(video_dir), num_frames=5, resolution=32, short_side=32, max_frame_stride=2)
    clips, held_out = open_bucketed_clips(data, (WIDE, TALL, IMAGE, LONG), seed=1)
    assert held_out is None and set(clips.buckets) == {WIDE, TALL, IMAGE, LONG}
    colours = {}
    for bucket in clips.buckets:
        batch = random_batch(clips, 0, 12, bucket)
        assert batch.shape == (12, 3, bucket.num_frames, bucket.height, bucket.width) and batch.abs().max() <= 1
        colours[bucket] = set(batch.mean(dim=(2, 3, 4)).argmax(dim=1).tolist())
        assert torch.equal(clips.random_clip(7, bucket), batch[7])
    # Square is as far from 24x40 as from 40x24; only it is long enough for 21 frames; all make images.
    assert colours == {WIDE: {0, 2}, TALL: {1, 2}, IMAGE: {0, 1, 2}, LONG: {2}}

    draws = [clips.choose_bucket(k, is_image=False) for k in range(300)]
    assert draws == [clips.choose_bucket(k, is_image=False) for k in range(300)]
    # 2, 2 and 1 shots.
    assert [draws.count(bucket) / 300 for bucket in (WIDE, TALL, LONG)] == pytest.approx([0.4, 0.4, 0.2], abs=0.08)
    assert {clips.choose_bucket(k, is_image=True) for k in range(5)} == {IMAGE}

    shots = [shot for shot in clips.shots_of(WIDE) if shot.path.endswith("wide.mp4")]
    narrow = BucketedClips(shots, (WIDE, LONG), seed=1)
    assert narrow.buckets == (WIDE,) and "no shot serves the bucket 21x32x32" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 1 shots .the longest has 18 frames. serves a bucket"):
        BucketedClips(shots, (LONG,), seed=1)
    with pytest.raises(ValueError, match="has one frame, which image_fraction asks for"):
        narrow.choose_bucket(0, is_image=True)


def bucket_job(video_dir: Path, **changes) -> FSAEJob:
    values = {"video_dir": str(video_dir), "buckets": ("5x16x16", "17x32x32", "1x32x16"), "image_fraction": 0.5}
    values |= {"micro_batch_size": 1, "global_batch_size": 4, "image_batch_size": 6}
    return build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values | changes)


def test_small_clips_come_in_larger_batches(video_dir: Path) -> None:
    batches = FSAEBatches(bucket_job(video_dir), dp_size=2)
    plans = {plan.bucket: plan for plan in map(batches.plan, range(40))}
    sizes = {str(bucket): (plan.num_samples, plan.micro_batch_size) for bucket, plan in plans.items()}
    # 17 x 32 x 32 pixels are 13.6 times 5 x 16 x 16: 14 samples at a time, 2 x 14 over two ranks, twice.
    assert sizes == {"17x32x32": (4, 1), "5x16x16": (56, 14), "1x32x16": (6, 3)}
    plan = plans[Bucket(1, 32, 16)]
    assert batches.read(10, plan).shape == (3, 3, 1, 32, 16)
    share = sum(batches.plan(k).bucket.num_frames == 1 for k in range(200)) / 200
    assert share == pytest.approx(0.5, abs=0.1)

    with pytest.raises(ValueError, match="bucket 5x18x16: height 18 is not a multiple"):
        FSAEBatches(bucket_job(video_dir, buckets=("5x18x16",)), 1)
    with pytest.raises(ValueError, match="has one frame, which image_fraction asks for"):
        FSAEBatches(bucket_job(video_dir, buckets=("5x16x16",)), 1)


def test_no_layout_changes_the_batches(video_dir: Path) -> None:
    """Bucket and number of samples of each step; the ranks' micro-batches are its samples, each once."""

    def steps(dp_size: int, cp_size: int, micro_batch_size: int) -> list[tuple]:
        changes = {"micro_batch_size": micro_batch_size, "image_batch_size": 8, "context_parallel_size": cp_size}
        batches = FSAEBatches(bucket_job(video_dir, **changes), dp_size, cp_size)
        plans = [batches.plan(k) for k in range(30)]
        for plan in plans:
            num_ranks = dp_size * (1 if plan.is_shared else cp_size)
            assert plan.num_samples % (num_ranks * plan.micro_batch_size) == 0
        return [(plan.bucket, plan.num_samples) for plan in plans]

    alone = steps(1, 1, 1)
    assert len({bucket for bucket, _ in alone}) == 3
    for layout in ((1, 1, 4), (2, 1, 1), (2, 1, 2), (4, 1, 1), (1, 2, 1), (2, 2, 1)):
        assert steps(*layout) == alone, layout
    with pytest.raises(ValueError, match="5x16x16 has 108 samples, .* data-parallel size 8 = 8 .nearest: 104 or 112"):
        FSAEBatches(bucket_job(video_dir, image_batch_size=8, global_batch_size=8, batch_size_multiple=4), 8)
