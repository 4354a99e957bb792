"""Training on clips that fit no device whole: tiles, slices and patches in the training step."""

from pathlib import Path

import pytest
import torch

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae import encode_tiled
from megatron_fsvideo.models.fsae.tiled_encoder import tile_halo
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.patches import check_memory_flags, draw_patch
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.state import TrainState
from tests.unit.fsae_fixtures import build, config, patch_config, random_latents, random_video
from tests.unit.fsae_large_clips import CUTS, SIDE, large_job, make_large_film
from tests.unit.test_fsae_patch import assert_same, gradients
from tests.unit.test_fsae_training import in_a_process_of_its_own, losses_of, run


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large_film(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("depths", [(1, 1, 1, 1, 1), (2, 2, 1, 1, 1), (0, 1, 1, 1, 1)])
@pytest.mark.parametrize("tile", [16, 20, 64])
def test_property_29_tiled_encoder_has_the_same_gradients(tile: int, depths: tuple[int, ...]) -> None:
    changes = {"encoder_depths": depths, "decoder_depths": (min(1, depths[0]), 1, 1, 1, 1)}
    fsae, video = build(patch_config(attention_stages=2, **changes)), random_video(5, 48, 64)
    weight = random_latents(fsae.config, 2, 3, 4)
    plain = gradients(fsae, lambda: (fsae.encode(video) * weight).sum())
    assert_same(gradients(fsae, lambda: (encode_tiled(fsae, video, tile) * weight).sum()), plain)


def test_the_tiles_margins_are_as_small_as_can_be() -> None:
    assert tile_halo(FSAEConfig()) == 4
    fsae = build(patch_config(attention_stages=2))
    halo, side = tile_halo(fsae.config), 16
    video = random_video(1, 4 * side, 16)
    whole, cut = fsae.encoder.outer(video, None), fsae.encoder.outer(video[:, :, :, 4 * 8 :], None)
    wrong = (whole[:, :, :, 8:] - cut).abs().amax(dim=(0, 1, 2, 4)) > 1e-12
    assert wrong.nonzero().flatten().tolist() == list(range(halo))
    with pytest.raises(ValueError, match="attention_stages 3 of 4 stages reach into them"):
        tile_halo(config(attention_stages=3))
    with pytest.raises(ValueError, match="a tile of 10 pixels"):
        encode_tiled(fsae, video, 10)


@pytest.mark.parametrize("slice_flag", ["encoder_tile", "encoder_slice"])
def test_less_memory_changes_no_number(video_dir: Path, slice_flag: str) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        found = []
        for changes in ({}, {slice_flag: {"encoder_tile": 32, "encoder_slice": 1}[slice_flag]}):
            step = FSAETask(large_job(3, video_dir, image_fraction=0.0, recompute_granularity="full", **changes), pgs)
            found.append(step.train_step(TrainState()).metrics)
        assert found[1] == pytest.approx(found[0], rel=1e-5)

    in_a_process_of_its_own(check)


def test_losses_and_discriminator_see_the_valid_region(video_dir: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        step = FSAETask(large_job(3, video_dir, image_fraction=0.0, global_batch_size=1, **CUTS), pgs)
        plan = step.batches.plan(0)
        video = step.batches.read(0, plan)
        box = draw_patch(step.learner.model, step.job, 0, video)
        assert (box.bottom - box.top, box.right - box.left, box.start, box.stop) == (10, 11, 0, 5)
        assert box == draw_patch(step.learner.model, step.job, 0, video)
        places = {(b.top, b.left) for b in (draw_patch(step.learner.model, step.job, k, video) for k in range(40))}
        assert places == {(top, left) for top in range(3) for left in range(2)}

        seen = []
        adversary = step.learner.adversary.backward
        step.learner.adversary.backward = lambda real, fake, *rest: (
            seen.append((real, fake)) or adversary(real, fake, *rest)
        )
        result = step.train_step(TrainState())
        ((real, fake),) = seen
        top, bottom = (8 * (box.top + 4) if box.top else 0), (SIDE if box.bottom == 12 else 8 * (box.bottom - 4))
        left, right = (8 * (box.left + 4) if box.left else 0), (SIDE if box.right == 12 else 8 * (box.right - 4))
        assert torch.equal(real, video[:, :, :, top:bottom, left:right]) and fake.shape == real.shape
        assert result.metrics["l1"] == pytest.approx(float((fake - real).abs().mean()), rel=1e-5)

    in_a_process_of_its_own(check)


def test_a_resumed_run_draws_the_same_patches(video_dir: Path, tmp_path: Path) -> None:
    values = CUTS | {"patch_latents": 4, "train_iters": 2, "image_fraction": 0.0}

    def check(pgs: groups.ProcessGroups) -> None:
        folder = str(tmp_path / "a")
        unbroken, _ = run(large_job(3, video_dir, save=folder, tensorboard_dir=folder, **values), pgs)
        folder = str(tmp_path / "b")
        for exit_interval in (1, 2):
            stops = {"save": folder, "load": folder, "tensorboard_dir": folder, "exit_interval": exit_interval}
            resumed, _ = run(large_job(3, video_dir, **values, **stops), pgs)
        theirs = resumed.learner.model.state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in unbroken.learner.model.state_dict().items())
        assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")

    in_a_process_of_its_own(check)


def test_flags_that_do_not_fit_are_refused(video_dir: Path) -> None:
    def refused(message: str, phase: int = 3, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            check_memory_flags(large_job(phase, video_dir, **changes))

    refused("encoder_slice 2 and patch_latents 0 cut time", context_parallel_size=2, encoder_slice=2)
    refused("encoder_tile 32 and encoder_slice 2 exclude each other", encoder_tile=32, encoder_slice=2)
    refused("encoder_tile 30 is not a multiple of 4", encoder_tile=30)
    refused("patch_rows 9: 4 cells of 8 pixels .* at least 11 pixels: give 10 or more", patch_rows=9)
    refused("patch_latents 2: 2 latent frames at each of 1 cuts", patch_latents=2)
    refused("patch_latents 4: 2 latent frames at each of 2 cuts .* give 5", phase=5, patch_latents=4)
    refused("latent_regularizer upscale decodes whole frames", phase=4, latent_regularizer="upscale", patch_rows=12)
    refused("latent_noise and vf_adaptive need a whole clip", context_parallel_size=2, latent_noise=0.1)
    check_memory_flags(large_job(5, video_dir, patch_latents=5))
