"""Training the autoencoder: clips, one-clip overfit, checkpoints that continue exactly, releases, user errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fsvideo.checkpoint.release import load_fsae, save_fsae
from megatron_fsvideo.config import (
    FSAE_PRESETS,
    FSAEConfig,
    FSAEJob,
    ParallelConfig,
    VideoDataConfig,
    build_job,
)
from megatron_fsvideo.data.clip_dataset import ClipDataset, open_clips
from megatron_fsvideo.data.shots import Shot
from megatron_fsvideo.data.video import read_video, to_unit, write_video
from megatron_fsvideo.models.codecs.identity import fingerprint
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.optim.muon import Muon
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.logging import MetricsLogger
from megatron_fsvideo.training.loop import train
from megatron_fsvideo.training.run import begin, checkpoints_of
from megatron_fsvideo.training.state import TrainState
from tests.parallel.harness import run_workers
from tests.unit.data_fixtures import random_batch

NUM_SHOTS, SHOT_FRAMES = 4, 20
ONE_RANK = SimpleNamespace(size=lambda: 1)


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("videos"))


def make_film(folder: Path) -> Path:
    """One film of four shots: textures of different colours that move one pixel a frame."""
    generator = torch.Generator().manual_seed(0)
    shots = []
    for k in range(NUM_SHOTS):
        texture = torch.rand(3, 12, 14, generator=generator)
        texture = torch.nn.functional.interpolate(texture[None], (48, 56), mode="bilinear")[0] * 0.4
        texture = texture + torch.tensor([[0.6, 0, 0], [0, 0.6, 0], [0, 0, 0.6], [0.5, 0.5, 0]])[k].view(3, 1, 1)
        frames = [texture.roll(frame, dims=2) for frame in range(SHOT_FRAMES)]
        shots.append(torch.stack(frames).movedim(1, -1))
    write_video(folder / "film.mp4", (torch.cat(shots) * 255).to(torch.uint8), fps=25, quality=5)
    return folder


def debug_job(video_dir: Path, **changes) -> FSAEJob:
    values = {"video_dir": str(video_dir), "holdout_every": 2, "train_iters": 6, "image_warmup_iters": 2}
    values |= {"micro_batch_size": 1, "global_batch_size": 2, "image_batch_size": 4, "latent_noise": 0.5}
    values |= {"optimizer": "muon", "ema_decay": 0.9, "image_fraction": 0.3}
    return build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values | changes)


def test_clips_are_a_function_of_their_number(video_dir: Path) -> None:
    data = VideoDataConfig(video_dir=str(video_dir), num_frames=5, resolution=32, short_side=40, holdout_every=2)
    clips, held_out = open_clips(data, seed=3)
    assert [shot.start for shot in clips.shots] == [0, 40] and [shot.start for shot in held_out.shots] == [20, 60]
    batch = random_batch(clips, 10, 4, 5, 32)
    assert batch.shape == (4, 3, 5, 32, 32) and batch.abs().max() <= 1
    again, _ = open_clips(data, seed=3)
    assert torch.equal(again.random_clip(12, 5, 32), batch[2])
    assert not torch.equal(batch[0], batch[1])
    other, _ = open_clips(data, seed=4)
    assert not torch.equal(other.random_clip(10, 5, 32), batch[0])

    # Colours tell the shots apart: no clip has a cut, none is of a held-out shot (green, yellow).
    for clip in random_batch(clips, 0, 40, 5, 32):
        red, green, blue = clip.mean(dim=(1, 2, 3))
        assert max(red, blue) > green + 0.3
        assert clip.mean(dim=(2, 3)).std(dim=1).max() < 0.1
    fixed = held_out.fixed_clips(3, 5, 32)
    assert fixed.shape == (4, 3, 5, 32, 32) and torch.equal(fixed, held_out.fixed_clips(3, 5, 32))
    assert fixed[0, 1].mean() > fixed[0, 2].mean() + 0.3


def test_clips_read_from_disk_are_those_from_memory(video_dir: Path) -> None:
    shots = [Shot(str(video_dir / "film.mp4"), 0, SHOT_FRAMES)]
    cached = ClipDataset(shots, 48, seed=0, max_frame_stride=3)
    from_disk = ClipDataset(shots, 48, seed=0, max_frame_stride=3, cache_gib=0.0)
    moves = set()
    for number in range(12):
        clip = cached.random_clip(number, 5, 32)
        assert torch.equal(clip, from_disk.random_clip(number, 5, 32))
        moves.add(_horizontal_move(clip))
    assert moves <= {-3, -2, -1, 1, 2, 3} and len(moves) >= 4, "strides 1-3, both ways round"


def _horizontal_move(clip: torch.Tensor) -> int:
    first, second = clip[:, 0, :, 4:-4], clip[:, 1]
    errors = {move: (first - second[:, :, 4 + move : 28 + move]).abs().mean().item() for move in range(-4, 5)}
    return min(errors, key=errors.get)


def test_damaged_and_short_videos(video_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(video_dir / "film.mp4", tmp_path)
    (tmp_path / "broken.mp4").write_bytes((video_dir / "film.mp4").read_bytes()[:3000])
    data = VideoDataConfig(video_dir=str(tmp_path), num_frames=5, resolution=32, short_side=32)
    clips, held_out = open_clips(data, seed=0)
    assert len(clips.shots) == NUM_SHOTS and held_out is None
    assert "skipped" in (message := capsys.readouterr().err) and "broken.mp4" in message

    with pytest.raises(ValueError, match="none of the 4 shots .* has 25 frames"):
        open_clips(VideoDataConfig(video_dir=str(tmp_path), num_frames=25, resolution=32, short_side=32), seed=0)
    with pytest.raises(ValueError, match="--video-dir"):
        open_clips(VideoDataConfig(), seed=0)
    with pytest.raises(ValueError, match="holds out none"):
        open_clips(VideoDataConfig(video_dir=str(tmp_path), holdout_every=9, num_frames=5), seed=0)


def test_property_28_one_clip_is_learnt(video_dir: Path) -> None:
    video = to_unit(read_video(video_dir / "film.mp4", 0, 5, size=(32, 32)))[None]
    torch.manual_seed(0)
    config = FSAEConfig(
        widths=(16, 16, 32),
        encoder_depths=(0, 1, 1),
        decoder_depths=(0, 1, 1),
        attention_stages=1,
        latent_channels=8,
        attention_head_dim=16,
        residual_init=0.1,
        resample_init=0.3,
        patchify_init=True,
    )
    fsae = FSAE(config)
    kernels = [p for p in fsae.parameters() if p.ndim >= 4]
    rest = [p for p in fsae.parameters() if p.ndim < 4]
    optimizers = [
        Muon([{"params": kernels, "lr": 0.02, "weight_decay": 0.0}], ONE_RANK, torch.bfloat16),
        torch.optim.AdamW(rest, lr=2e-3),
    ]
    errors = []
    for _ in range(60):
        error = (fsae(video)[0] - video).abs().mean()
        error.backward()
        errors.append(error.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert errors[-1] < 0.25 * errors[0], (errors[0], errors[-1])


def in_a_process_of_its_own(check: Callable[[groups.ProcessGroups], None]) -> None:
    """Run a check that needs process groups; in the test process they would break every later fork."""
    run_workers(lambda: check(groups.initialize(ParallelConfig())), 1)


def load(job: FSAEJob, pgs: groups.ProcessGroups) -> tuple[FSAETask, TrainState]:
    """As a run begins."""
    task = FSAETask(job, pgs)
    return task, begin(task, checkpoints_of(job, task, pgs))


def run(job: FSAEJob, pgs: groups.ProcessGroups) -> tuple[FSAETask, TrainState]:
    """As pretrain_fsae.py, within a process that goes on."""
    task = FSAETask(job, pgs)
    checkpoints = checkpoints_of(job, task, pgs)
    state = begin(task, checkpoints)
    logger = MetricsLogger(job.logging, job.training.train_iters, state.iteration)
    train(task, checkpoints, state, job.training, job.checkpoint, logger)
    return task, state


def test_a_resumed_run_is_the_unbroken_one(video_dir: Path, tmp_path: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        job = debug_job(video_dir, save=str(tmp_path / "a"), tensorboard_dir=str(tmp_path / "a"), eval_iters=1)
        unbroken, state = run(job, pgs)
        # Two image steps of 4, then 2 clips or, drawn, 4 images.
        assert state.iteration == 6 and 4 + 4 + 4 * 2 <= state.consumed_samples <= 6 * 4

        # Interrupted where the image phase ends, and once more. One checkpoint is kept.
        for exit_interval in (2, 1, 6):
            folder = str(tmp_path / "b")
            resumed, _ = run(
                debug_job(
                    video_dir,
                    save=folder,
                    load=folder,
                    tensorboard_dir=folder,
                    eval_iters=1,
                    exit_interval=exit_interval,
                    keep_checkpoints=1,
                ),
                pgs,
            )
        for (name, ours), theirs in zip(
            unbroken.learner.model.state_dict().items(), resumed.learner.model.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
        assert {"loss", "l1", "grad_norm", "learning_rate"} <= json.loads(
            (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[1]
        ).keys()

        # The folder is an autoencoder for others: the averaged weights.
        loaded = load_fsae(tmp_path / "b")
        average = resumed.learner.fsae.average.weights
        assert torch.equal(
            loaded.encoder.conv_out.weight, average["0.encoder.conv_out.weight"].view_as(loaded.encoder.conv_out.weight)
        )
        assert not torch.equal(loaded.encoder.conv_out.weight, resumed.learner.model.encoder.conv_out.weight)
        assert [path.name for path in sorted((tmp_path / "b").glob("iter_*"))] == ["iter_0000006"]
        assert load_fsae(tmp_path / "a" / "iter_0000006" / "model").latent_channels == 4

        finetune, state = load(debug_job(video_dir, load=str(tmp_path / "b"), finetune=True), pgs)
        assert state == TrainState() and torch.equal(
            finetune.learner.model.encoder.conv_out.weight, resumed.learner.model.encoder.conv_out.weight
        )
        with pytest.raises(ValueError, match=r"another architecture: .*latent_channels"):
            load(debug_job(video_dir, load=str(tmp_path / "b"), latent_channels=8), pgs)

        # Neither other videos, nor another seed or batch, continue at its position.
        (tmp_path / "other").mkdir()
        other = make_film(tmp_path / "other") / "film.mp4"
        other.write_bytes(other.read_bytes() + bytes(8))
        for changes, said in (
            ({"video_dir": other.parent}, "the shots of video_dir .2. are others"),
            ({"seed": 3, "image_batch_size": 8}, "image_batch_size is 8, it was 4; seed is 3, it was 1234"),
            ({"global_batch_size": 4}, "global_batch_size is 4, it was 2.* --new-stage"),
        ):
            with pytest.raises(ValueError, match=said):
                load(debug_job(**{"video_dir": video_dir, "load": str(tmp_path / "b")} | changes), pgs)

    in_a_process_of_its_own(check)


def losses_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # `iteration_time` and its like are the clock's.
    return [{key: value for key, value in row.items() if "loss" in key or "psnr" in key or key == "l1"} for row in rows]


def test_jobs_that_cannot_run_are_refused(video_dir: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        with pytest.raises(ValueError, match="resolution 36 is not a multiple .* factor 8; try 32"):
            build_job(FSAEJob, FSAE_PRESETS["fsae_quickstart"] | {"resolution": 36})
        with pytest.raises(ValueError, match="perceptual_trunk is none"):
            build_job(FSAEJob, {"perceptual_trunk": "none"})
        with pytest.raises(ValueError, match="num_frames must be 4k.1 .* got 16; try 17"):
            build_job(FSAEJob, {"num_frames": 16})
        with pytest.raises(ValueError, match="train_iters 2 ends within the image_warmup_iters 2, on single frames"):
            FSAETask(debug_job(video_dir, train_iters=2), pgs)
        with pytest.raises(ValueError, match="set holdout_every"):
            FSAETask(debug_job(video_dir, eval_iters=1, holdout_every=0), pgs)

    in_a_process_of_its_own(check)


def test_release_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fsae = FSAE(debug_job(tmp_path).model)
    save_fsae(tmp_path / "release", fsae)
    assert sorted(path.name for path in (tmp_path / "release").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_fsae(tmp_path / "release")
    assert loaded.config == fsae.config and fingerprint(loaded) == fingerprint(fsae)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert load_fsae(tmp_path / "release", dtype=torch.bfloat16).encoder.conv_out.weight.dtype == torch.bfloat16

    # Replaced as a whole, and nothing is left beside it.
    with torch.no_grad():
        fsae.decoder.conv_in.bias.add_(1.0)
    save_fsae(tmp_path / "release", fsae)
    assert fingerprint(load_fsae(tmp_path / "release")) == fingerprint(fsae)
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_releases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_fsae(tmp_path, FSAE(debug_job(tmp_path).model))
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="is no release: it does not exist"):
        load_fsae(tmp_path / "nowhere")

    config["model"]["latent_channels"] = 8
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit the model in \d+ weights: decoder.conv_in.weight"):
        load_fsae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": "something else"}))
    with pytest.raises(ValueError, match="'something else', not an autoencoder"):
        load_fsae(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_fsae(tmp_path)
