"""Batch sizes of buckets follow the work that their clips are."""

from pathlib import Path

import pytest
from test_bucketed_clips import bucket_job, video_dir  # noqa: F401

from megatron_fsvideo.tasks.fsae.batches import FSAEBatches


def test_where_a_patch_is_decoded_small_clips_do_not_come_in_huge_batches(video_dir: Path) -> None:  # noqa: F811
    buckets = {"buckets": ("17x32x32", "17x16x16"), "image_fraction": 0.0, "global_batch_size": 2}
    whole = FSAEBatches(bucket_job(video_dir, **buckets), dp_size=1)
    patches = FSAEBatches(bucket_job(video_dir, **buckets, patch_rows=4, patch_columns=4), dp_size=1)
    sizes = [{str(bucket): size for bucket, size in part.batch_sizes.items()} for part in (whole, patches)]
    # A quarter of the pixels to encode and decode; or a quarter to encode, and a patch of 16 x 16 pixels of both.
    assert sizes[0] == {"17x32x32": 2, "17x16x16": 8}
    assert sizes[1]["17x32x32"] == 2
    assert sizes[1]["17x16x16"] == pytest.approx(2 * (3 * 32**2 + 3 * 16**2) / (6 * 16**2), abs=1)
