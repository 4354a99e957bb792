"""The autoencoder's training phases: adversary, alignment, regularisers, decoders; resume, and from phase to phase."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.evaluation.perceptual import PerceptualLoss
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.training.fsae_adversary import Adversary
from megatron_fsvideo.training.fsae_optimizer import FSAEOptimizer
from megatron_fsvideo.training.state import TrainState
from megatron_fsvideo.training.steps.fsae import FSAEStep
from megatron_fsvideo.training.steps.fsae_objective import FSAEObjective
from megatron_fsvideo.training.steps.fsae_trainee import FSAETrainee
from tests.unit.test_fsae_training import in_a_process_of_its_own, losses_of, make_film, run

ONE_PROCESS = SimpleNamespace(device=torch.device("cpu"), dp_size=1)
TINY_ADVERSARY = {"discriminator_width": 4, "discriminator_scales": 1, "discriminator_layers": 2, "r1_interval": 2}


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dino")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def phase_job(phase: int, **changes) -> FSAEJob:
    values = {"phase": phase, "train_iters": 5, "micro_batch_size": 1, "global_batch_size": 2, "image_batch_size": 2}
    values |= TINY_ADVERSARY | {"image_fraction": 0.3, "ema_decay": 0.9, "vf_grid": 4, "lr": 1e-3}
    return build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values | changes)


def weights_of(step: FSAEStep) -> dict[str, Tensor]:
    return dict(step.trainee.state_dict()) | {f"D.{k}": v for k, v in step.adversary.model.state_dict().items()}


class TwoLayerTrunk(nn.Module):
    """A perceptual trunk that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, frames: Tensor) -> list[Tensor]:
        first = F.relu(self.first(frames))
        return [first, F.relu(self.second(first))]


def test_property_25_the_total_loss_has_the_papers_weights(dino_folder: Path) -> None:
    # No weight is given here: these are the defaults of the configuration, and those of the paper.
    job = build_job(
        FSAEJob,
        {name: value for name, value in FSAE_PRESETS["fsae_debug"].items() if name != "perceptual_weight"}
        | {"phase": 4, "perceptual_trunk_path": "unused", "vf_encoder_path": str(dino_folder), "vf_grid": 4},
    )
    objective = FSAEObjective(phase_job(4, vf_encoder_path=str(dino_folder)), ONE_PROCESS.device)
    objective.job, objective.perceptual = job, PerceptualLoss(TwoLayerTrunk(), None, "tiny")
    adversary = Adversary(phase_job(4), ONE_PROCESS)
    trainee = FSAETrainee(FSAE(job.model), True, LatentProjection(job.model.latent_channels, 16))
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    features = objective.features(video)
    output = trainee(video, None, None, features.shape[3:])
    loss, parts = objective(output, video, trainee.fsae, features=features, adversary=adversary)
    assert parts.keys() == {"l1", "perceptual", "gan", "vf_cosine", "vf_distance"}
    assert min(parts.values()) > 0
    expected = parts["l1"] + 0.1 * parts["perceptual"] + 0.1 * parts["gan"]
    expected = expected + 0.5 * (parts["vf_cosine"] + parts["vf_distance"])
    assert torch.allclose(loss, expected, rtol=1e-6)
    loss.backward()
    assert all(p.grad is None for p in adversary.model.parameters()), "the generator's loss trains no discriminator"


@pytest.mark.parametrize("phase", [2, 4])
def test_a_resumed_gan_run_is_the_unbroken_one(video_dir: Path, dino_folder: Path, tmp_path: Path, phase: int) -> None:
    values = {"video_dir": str(video_dir), "discriminator_warmup_iters": 2, "vf_encoder_path": str(dino_folder)}

    def check(pgs: groups.ProcessGroups) -> None:
        folder = str(tmp_path / "a")
        unbroken, state = run(phase_job(phase, save=folder, tensorboard_dir=folder, **values), pgs)
        assert state.iteration == 5
        # Interrupted while the discriminator learns alone, and between two R1 penalties.
        for exit_interval in (1, 2, 5):
            folder = str(tmp_path / "b")
            changes = {"save": folder, "load": folder, "tensorboard_dir": folder, "exit_interval": exit_interval}
            resumed, _ = run(phase_job(phase, **values, **changes), pgs)
        theirs = weights_of(resumed)
        for name, ours in weights_of(unbroken).items():
            assert torch.equal(ours, theirs[name]), name
        assert ("projection.weight" in theirs) == (phase == 4)
        assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")

        with pytest.raises(ValueError, match=f"is of phase {phase}, this run of phase 3"):
            FSAEStep(phase_job(3, load=folder, **values), pgs).load()
        with pytest.raises(ValueError, match="was trained with a discriminator"):
            FSAEStep(phase_job(phase, load=folder, gan_weight=0.0, **values), pgs).load()

    in_a_process_of_its_own(check)


def test_the_discriminator_learns_alone_first(video_dir: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        step = FSAEStep(phase_job(2, video_dir=str(video_dir), discriminator_warmup_iters=1), pgs)
        moves = []
        for iteration in range(2):
            before = {name: weight.clone() for name, weight in weights_of(step).items()}
            result = step.train_step(TrainState(iteration, 2 * iteration))
            after = weights_of(step)
            moved = {name[:2] for name, weight in before.items() if not torch.equal(weight, after[name])}
            moves.append((moved, result.metrics))
        (first, first_metrics), (second, second_metrics) = moves
        assert first == {"D."} and first_metrics["grad_norm"] == 0 and "r1" in first_metrics
        assert second == {"D.", "fs"} and second_metrics["grad_norm"] > 0 and "r1" not in second_metrics
        assert step.ema is not None and second_metrics["gan"] > 0 and second_metrics["discriminator"] > 0

    in_a_process_of_its_own(check)


@pytest.mark.parametrize("kind", ["downscale", "upscale", "eq-vae"])
def test_property_26_the_regularisations_of_table_1_train(video_dir: Path, kind: str) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        values = {"video_dir": str(video_dir), "latent_regularizer": kind, "vf_weight": 0.0, "image_fraction": 0.0}
        step = FSAEStep(phase_job(4, global_batch_size=1, **values), pgs)
        seen, state = set(), TrainState()
        for _ in range(6 if kind == "eq-vae" else 1):
            result = step.train_step(state)
            state.advance(result.num_samples)
            metrics = result.metrics
            seen |= {name for name in metrics if name in ("l1", "transformed_l1", "gan")}
            if kind == "upscale":
                expected = metrics["l1"] + 0.1 * metrics["gan"] + 0.25 * metrics["transformed_l1"]
                assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
            if kind == "eq-vae" and "transformed_l1" in metrics:
                assert metrics["loss"] == pytest.approx(metrics["transformed_l1"], rel=1e-5) and "l1" not in metrics
        assert seen == {"l1", "transformed_l1", "gan"}

    in_a_process_of_its_own(check)


def test_property_28_one_clip_is_learnt_with_the_adversary() -> None:
    values = {"widths": (16, 16, 32), "residual_init": 0.1, "resample_init": 0.3, "optimizer": "muon", "lr": 2e-3}
    job = phase_job(2, r1_interval=8, **values)
    torch.manual_seed(0)
    trainee = FSAETrainee(FSAE(job.model), True)
    objective, adversary = FSAEObjective(job, ONE_PROCESS.device), Adversary(job, ONE_PROCESS)
    optimizer = FSAEOptimizer(trainee, job.optimizer, 25)
    texture = F.interpolate(torch.rand(1, 3, 6, 7) * 2 - 1, (32, 40), mode="bilinear")[0]
    video = torch.stack([texture[:, :, k : k + 32] for k in range(5)], dim=1)[None]
    errors = []
    for iteration in range(25):
        output = trainee(video)
        loss, parts = objective(output, video, trainee.fsae, adversary=adversary)
        loss.backward()
        adversary.backward(video, output.reconstruction, iteration, 1.0)
        optimizer.step(iteration)
        adversary.step(iteration)
        errors.append(float(parts["l1"]))
    assert errors[-1] < 0.5 * errors[0], (errors[0], errors[-1])


def test_jobs_whose_phase_does_not_allow_them_are_refused() -> None:
    with pytest.raises(ValueError, match="phase must be 1 to 6, got 7"):
        phase_job(7)
    with pytest.raises(ValueError, match="image_warmup_iters 5 starts a model from images, which phase 2"):
        phase_job(2, image_warmup_iters=5)
    with pytest.raises(ValueError, match="latent_regularizer downscale .* phase 5"):
        phase_job(5, latent_regularizer="downscale")
    with pytest.raises(ValueError, match="give --vf-encoder-path"):
        FSAEObjective(phase_job(4), ONE_PROCESS.device)
    assert not phase_job(1).uses_gan and phase_job(2).uses_gan and not phase_job(2, gan_weight=0.0).uses_gan
    assert [phase for phase in range(1, 7) if phase_job(phase).uses_vf] == [4]
