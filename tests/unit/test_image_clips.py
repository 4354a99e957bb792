"""Image files are videos of one frame: in preprocessing, in training, in the index."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_fixtures import moving_video, random_batch, tiny_encoders, tiny_options
from PIL import Image

from megatron_fsvideo.config import VideoDataConfig
from megatron_fsvideo.data.bucketed_clips import open_bucketed_clips
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clip_dataset import open_clips
from megatron_fsvideo.data.frame_files import list_clip_files
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.latent_shards import read_json
from megatron_fsvideo.data.manifest import folder_entries
from megatron_fsvideo.data.preprocessing import preprocess
from megatron_fsvideo.data.video import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five photos, two of them upright, one damaged; a film with a preview beside it."""
    place = tmp_path / "media"
    place.mkdir()
    for k in range(5):
        size = (60, 40) if k < 3 else (40, 60)
        Image.new("RGB", size, (200, 20 * k, 0)).save(place / f"photo{k}.png")
        (place / f"photo{k}.txt").write_text(f"photo {k}")
    (place / "broken.jpg").write_bytes(b"no image")
    write_video(place / "film.mp4", moving_video(20, 36, 64), 8)
    Image.new("RGB", (64, 36)).save(place / "film.jpg")
    return place


def test_a_preview_beside_its_video_does_not_count(folder):
    names = [path.name for path in list_clip_files(folder)]
    assert names == ["broken.jpg", "film.mp4", *(f"photo{k}.png" for k in range(5))]


def test_images_are_encoded_in_buckets_of_one_frame(folder, tmp_path):
    (folder / "film.mp4").unlink()
    (folder / "film.jpg").unlink()
    options = tiny_options("1x32x48", "1x48x32", max_bad_fraction=0.2)
    assert preprocess(tmp_path / "out", folder_entries(folder), tiny_encoders(), options)
    values = read_json(tmp_path / "out" / "dataset.json")
    assert values["buckets"] == {"1x32x48": 3, "1x48x32": 2}
    ((name, reason),) = values["skipped"]
    assert name == "broken.jpg" and "not an image" in reason
    dataset = LatentDataset([str(tmp_path / "out")])
    sample = dataset.read(0, 0)
    assert sample.latents.shape[1] == 1 and sample.record["caption"].startswith("photo")


def test_training_draws_images_for_batches_of_one_frame(folder, capsys):
    data = VideoDataConfig(video_dir=str(folder), num_frames=17, resolution=32, short_side=32)
    clips, _ = open_clips(data, seed=0)
    assert "broken.jpg" in capsys.readouterr().err
    batch = random_batch(clips, 0, 40, 1, 32)
    is_photo = (batch[:, 0].mean(dim=(1, 2, 3)) > 0.5) & (batch[:, 2].mean(dim=(1, 2, 3)) < -0.99)
    assert 3 <= is_photo.sum() < 40
    assert random_batch(clips, 0, 3, 17, 32).shape == (3, 3, 17, 32, 32)
    bucketed, _ = open_bucketed_clips(data, [Bucket(1, 32, 48), Bucket(17, 32, 48)], seed=0)
    assert len(bucketed.shots_of(Bucket(1, 32, 48))) == 6 and len(bucketed.shots_of(Bucket(17, 32, 48))) == 1
    assert random_batch(bucketed, 0, 4, Bucket(1, 32, 48)).shape == (4, 3, 1, 32, 48)


def test_a_folder_of_images_alone(folder):
    (folder / "film.mp4").unlink()
    few = VideoDataConfig(video_dir=str(folder), num_frames=1, resolution=32, short_side=32, holdout_every=2)
    clips, held_out = open_clips(few, seed=0)
    assert (len(clips.shots), len(held_out.shots)) == (3, 3)  # film.jpg counts now
    assert np.isclose(float(clips.random_clip(3, 1, 32).amax()), 200 / 127.5 - 1, atol=0.02)
    with pytest.raises(ValueError, match="none of the 6 shots .* has 17 frames: lower num_frames"):
        open_clips(VideoDataConfig(video_dir=str(folder), num_frames=17, resolution=32, short_side=32), seed=0)
    assert torch.is_tensor(held_out.fixed_clips(3, 1, 32))
