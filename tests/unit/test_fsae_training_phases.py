"""The autoencoder's training phases: adversary, alignment, regularisers, decoders; resume, and from phase to phase."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fsvideo.checkpoint.release import load_fsae, save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.losses.video_vf import LatentProjection
from megatron_fsvideo.models.frozen.perceptual import PerceptualLoss
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.discriminator import Discriminator
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.adversary import Adversary
from megatron_fsvideo.tasks.fsae.forward import FSAEForward
from megatron_fsvideo.tasks.fsae.inheritance import inherit_autoencoder
from megatron_fsvideo.tasks.fsae.learner import FSAELearner, MicroBatch
from megatron_fsvideo.tasks.fsae.objective import FSAEObjective
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.run import checkpoints_of
from megatron_fsvideo.training.state import TrainState
from tests.unit.test_fsae_training import in_a_process_of_its_own, load, losses_of, make_film, run

CPU = torch.device("cpu")
TINY_ADVERSARY = {"discriminator_width": 4, "discriminator_scales": 1, "discriminator_layers": 2, "r1_interval": 2}


@pytest.fixture(scope="module")
def video_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("videos"))


def phase_job(phase: int, **changes) -> FSAEJob:
    values = {"phase": phase, "train_iters": 5, "micro_batch_size": 1, "global_batch_size": 2, "image_batch_size": 2}
    values |= TINY_ADVERSARY | {"image_fraction": 0.3, "ema_decay": 0.9, "vf_grid": 4, "lr": 1e-3}
    return build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | values | changes)


def weights_of(task: FSAETask) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": weight
        for name, network in task.networks.items()
        for key, weight in network.model.state_dict().items()
    }


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

    def check(pgs: groups.ProcessGroups) -> None:
        objective = FSAEObjective(phase_job(4, vf_encoder_path=str(dino_folder)), CPU)
        objective.job, objective.perceptual = job, PerceptualLoss(TwoLayerTrunk(), None, "tiny")
        adversary = Adversary(phase_job(4), pgs)
        forward = FSAEForward(FSAE(job.model), True, LatentProjection(job.model.latent_channels, 16))
        video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
        features = objective.features(video)
        output = forward(video, None, None, features.shape[3:])
        with adversary.network.frozen():
            loss, parts = objective(output, video, forward.fsae, features=features, adversary=adversary)
            loss.backward()
        assert parts.keys() == {"l1", "perceptual", "gan", "vf_cosine", "vf_distance"}
        assert min(parts.values()) > 0
        expected = parts["l1"] + 0.1 * parts["perceptual"] + 0.1 * parts["gan"]
        expected = expected + 0.5 * (parts["vf_cosine"] + parts["vf_distance"])
        assert torch.allclose(loss, expected, rtol=1e-6)
        learnt = [p.main_grad.abs().max() for p in adversary.model.parameters()]
        assert max(learnt) == 0, "the generator's loss trains no discriminator"
        assert all(p.requires_grad for p in adversary.model.parameters())

    in_a_process_of_its_own(check)


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

        with pytest.raises(
            ValueError, match="another phase: checkpoint 2, this run 3|discriminator and fsae and projection"
        ):
            load(phase_job(3, load=folder, **values), pgs)
        with pytest.raises(ValueError, match="of a run that trains discriminator and fsae.*, this run trains fsae"):
            load(phase_job(phase, load=folder, gan_weight=0.0, **values), pgs)

    in_a_process_of_its_own(check)


def test_the_discriminator_learns_alone_first(video_dir: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        step = FSAETask(phase_job(2, video_dir=str(video_dir), discriminator_warmup_iters=1), pgs)
        moves = []
        for iteration in range(2):
            before = {name: weight.clone() for name, weight in weights_of(step).items()}
            result = step.train_step(TrainState(iteration, 2 * iteration))
            after = weights_of(step)
            moved = {name[:2] for name, weight in before.items() if not torch.equal(weight, after[name])}
            moves.append((moved, result.metrics))
        (first, first_metrics), (second, second_metrics) = moves
        assert first == {"di"} and first_metrics["grad_norm"] == 0 and "r1" in first_metrics
        assert second == {"di", "fs"} and second_metrics["grad_norm"] > 0 and "r1" not in second_metrics
        assert (
            step.learner.fsae.average is not None and second_metrics["gan"] > 0 and second_metrics["discriminator"] > 0
        )

    in_a_process_of_its_own(check)


def test_the_discriminators_gradients_are_exact_in_bf16_runs() -> None:
    video, reconstruction = torch.randn(2, 1, 3, 5, 32, 32).unbind(0)

    def check(pgs: groups.ProcessGroups) -> None:
        gradients = []
        for bf16 in (False, True):
            adversary = Adversary(phase_job(2, bf16=bf16), pgs)
            for _ in range(3):  # memory that was used before: an uninitialised gradient shows
                adversary.network.discard()
                adversary.backward(video, reconstruction.bfloat16() if bf16 else reconstruction, 1, 1.0, True)
            gradients.append(torch.cat([p.main_grad.flatten() for p in adversary.model.parameters()]))
        assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
        assert adversary.generator_loss(reconstruction.bfloat16()).isfinite()

    in_a_process_of_its_own(check)


@pytest.mark.parametrize("kind", ["downscale", "upscale", "eq-vae"])
def test_property_26_the_regularisations_of_table_1_train(video_dir: Path, kind: str) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        values = {"video_dir": str(video_dir), "latent_regularizer": kind, "vf_weight": 0.0, "image_fraction": 0.0}
        step = FSAETask(phase_job(4, global_batch_size=1, **values), pgs)
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
    job = phase_job(2, r1_interval=8, train_iters=25, **values)
    torch.manual_seed(0)
    texture = F.interpolate(torch.rand(1, 3, 6, 7) * 2 - 1, (32, 40), mode="bilinear")[0]
    video = torch.stack([texture[:, :, k : k + 32] for k in range(5)], dim=1)[None]

    def check(pgs: groups.ProcessGroups) -> None:
        learner, errors = FSAELearner(job, pgs), []
        for iteration in range(25):
            batch = MicroBatch(video, 0, iteration, None, None, None, weight=1.0, is_last=True)
            errors.append(float(learner.learn(batch)["l1"]))
            learner.step(iteration, learner.adversary, 0.0)
        assert errors[-1] < 0.5 * errors[0], (errors[0], errors[-1])

    in_a_process_of_its_own(check)


def test_a_loss_that_is_not_finite_costs_one_step(video_dir: Path) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        step = FSAETask(phase_job(2, video_dir=str(video_dir), image_fraction=0.0), pgs)
        before = {name: weight.clone() for name, weight in weights_of(step).items()}
        read = step.batches.read
        step.batches.read = lambda first, plan: read(first, plan) * (float("nan") if first == 7 else 1.0)
        result = step.train_step(TrainState(3, 6))
        assert "loss is nan" in result.skipped and "clips 7-7 of shape 5x32x32" in result.skipped
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(step).items())
        result = step.train_step(TrainState(4, 8))
        assert result.skipped is None and result.metrics["grad_norm"] > 0
        assert all(weight.isfinite().all() for weight in weights_of(step).values())

    in_a_process_of_its_own(check)


DECODERS = {5: {"decoder": "standard"}, 6: {"decoder": "lite", "decoder_widths": (4, 8, 16)}}
DECODERS = {phase: values | {"first_frame_head_dim": 8} for phase, values in DECODERS.items()}


@pytest.mark.parametrize("phase", [5, 6])
def test_property_27_the_encoder_is_frozen(video_dir: Path, phase: int) -> None:
    def check(pgs: groups.ProcessGroups) -> None:
        step = FSAETask(phase_job(phase, video_dir=str(video_dir), **DECODERS[phase]), pgs)
        decoder = {id(p) for p in step.learner.model.decoder.parameters()}
        assert {
            id(p) for link in step.learner.fsae.optimizer.chained_optimizers for p in link.get_parameters()
        } == decoder
        model = step.learner.model
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        state = TrainState()
        for _ in range(2):
            result = step.train_step(state)
            state.advance(result.num_samples)
        moved = {
            name for name, weight in step.learner.model.state_dict().items() if not torch.equal(weight, before[name])
        }
        assert not any(name.startswith("encoder.") for name in moved)
        assert all(p.grad is None and not p.requires_grad for p in step.learner.model.encoder.parameters())
        # The attention's `out` starts at zero: it learns at once, and what is behind it from the second step on.
        assert {"decoder.conv_in.weight", "decoder.first_frame.0.out.weight"} <= moved
        assert "decoder.first_frame.0.query.weight" in moved and result.metrics["gan"] > 0

    in_a_process_of_its_own(check)


def test_property_30_each_phase_begins_where_the_last_one_ended(
    video_dir: Path, dino_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    attention = [f"query_norm.{kind}" for kind in ("weight", "bias")] + [
        f"feature_norm.{k}" for k in ("weight", "bias")
    ]
    attention += [f"{name}.weight" for name in ("query", "key", "value", "out")]
    narrower = ["ups.0", "ups.1.conv", "stages.1", "stages.2", "head_norm", "head"]

    def check(pgs: groups.ProcessGroups) -> None:
        previous = None
        for phase in range(1, 7):
            values = {"vf_encoder_path": str(dino_folder), "save": str(tmp_path / str(phase)), "init_from": previous}
            values |= {"video_dir": str(video_dir), "train_iters": 1, "image_fraction": 0.0, "global_batch_size": 1}
            job = phase_job(phase, **values | DECODERS.get(phase, {}))
            step = FSAETask(job, pgs)
            initial = {name: weight.clone() for name, weight in step.learner.model.state_dict().items()}
            checkpoints = checkpoints_of(job, step, pgs)
            checkpoints.load(step.networks)
            if previous is not None:
                check_inherited(step, phase, load_fsae(previous).state_dict(), initial)
            step.train_step(TrainState())
            checkpoints.save(TrainState(1, 1), step.networks)
            previous = str(tmp_path / str(phase))

    def check_inherited(step: FSAETask, phase: int, theirs: dict[str, Tensor], initial: dict[str, Tensor]) -> None:
        ours = step.learner.model.state_dict()
        fresh = {name for name, weight in ours.items() if torch.equal(weight, initial[name])}
        fresh -= {name for name in fresh if name in theirs and torch.equal(theirs[name], ours[name])}
        expected = set()
        if phase == 5:
            expected = {f"decoder.first_frame.0.{name}" for name in attention}
        if phase == 6:
            expected = {name for name in ours if any(name.startswith(f"decoder.{part}.") for part in narrower)}
            expected -= {"decoder.head.bias"}  # three colours, however wide what is before it
        assert fresh == expected
        same = {name for name in ours if name in theirs and torch.equal(ours[name], theirs[name])}
        if phase == 5:
            # Causal taps (t-2, t-1, t) became (t-1, t, t+1), so that no convolution looks ahead at first.
            taps = theirs["decoder.conv_in.weight"]
            centred = torch.stack([taps[:, :, 0] + taps[:, :, 1], taps[:, :, 2], torch.zeros_like(taps[:, :, 0])], 2)
            assert torch.equal(ours["decoder.conv_in.weight"], centred)
            kept = {name for name in ours if name.startswith("encoder.") or name.endswith("bias")} - fresh
            assert kept <= same
        else:
            assert same == set(ours) - fresh

    in_a_process_of_its_own(check)
    printed = capfd.readouterr().out.splitlines()
    discriminators = [line.split()[1] for line in printed if line.startswith("discriminator")]
    assert discriminators == ["fresh", "from", "from", "from", "from"]
    lines = [line for line in printed if line.startswith("autoencoder from")]
    assert [line.endswith("fresh tensors: none") for line in lines] == [True, True, True, False, False]
    assert "decoder.first_frame.0.out.weight" in lines[3] and "decoder.head.weight" in lines[4]


def test_weights_that_do_not_fit_are_not_inherited(tmp_path: Path) -> None:
    save_fsae(tmp_path / "other", FSAE(phase_job(1, latent_channels=8).model))
    save_fsae(tmp_path / "standard", FSAE(phase_job(5, **DECODERS[5]).model))
    with pytest.raises(ValueError, match="encoder weights do not fit .encoder.conv_out"):
        inherit_autoencoder(str(tmp_path / "other"), FSAE(phase_job(2).model))
    with pytest.raises(ValueError, match="a standard decoder cannot become causal"):
        inherit_autoencoder(str(tmp_path / "standard"), FSAE(phase_job(2).model))
    plain, deeper = phase_job(2).model, phase_job(2, decoder_depths=(2, 1, 1)).model
    save_fsae(tmp_path / "plain", FSAE(plain))
    save_fsae(tmp_path / "deeper", FSAE(deeper))
    with pytest.raises(ValueError, match="weights that this model lacks: decoder.stages.2.1"):
        inherit_autoencoder(str(tmp_path / "deeper"), FSAE(plain))
    with pytest.raises(ValueError, match="does not fit in . weights of the decoder: .*stages.2.1.*decoder_depths"):
        inherit_autoencoder(str(tmp_path / "plain"), FSAE(deeper))

    def check(pgs: groups.ProcessGroups) -> None:
        with pytest.raises(ValueError, match="discriminator differs in scales.0.layers.0.bias"):
            Adversary(phase_job(2), pgs).load_weights(Discriminator(8, 1, 2).state_dict())

    in_a_process_of_its_own(check)


@pytest.mark.parametrize("phase", range(1, 7))
def test_the_presets_are_the_papers(phase: int) -> None:
    job = build_job(FSAEJob, FSAE_PRESETS[f"fsae_phase{phase}"])
    weights = (job.losses.l1_weight, job.losses.perceptual_weight, job.adversary.gan_weight, job.alignment.vf_weight)
    assert weights == (1.0, 0.1, 0.1, 0.5) and job.phase.phase == phase
    assert (job.optimizer.adam_beta1, job.optimizer.adam_beta2) == (0.9, 0.95)
    buckets = [Bucket.parse(text) for text in job.data.buckets]
    for bucket in buckets:
        bucket.check_factors(job.model.spatial_factor)
    assert {17: 1, 61: 2, 169: 3}[max(b.num_frames for b in buckets)] == min(phase, 3)
    assert any(bucket.num_frames == 1 for bucket in buckets) and job.phase.image_fraction > 0
    side = Discriminator(1, job.adversary.discriminator_scales, job.adversary.discriminator_layers).smallest_side
    assert min(min(bucket.height, bucket.width) for bucket in buckets) >= side


def test_jobs_whose_phase_does_not_allow_them_are_refused() -> None:
    with pytest.raises(ValueError, match="phase must be an integer of at least 1 and of at most 6, got 7"):
        phase_job(7)
    with pytest.raises(ValueError, match="image_warmup_iters 5 starts a model from images, which phase 2"):
        phase_job(2, image_warmup_iters=5)
    with pytest.raises(ValueError, match="latent_regularizer downscale .* phase 5"):
        phase_job(5, latent_regularizer="downscale", **DECODERS[5])
    with pytest.raises(ValueError, match="phase 5 trains a standard decoder, but decoder is causal"):
        phase_job(5)
    with pytest.raises(ValueError, match="latent_noise 0.1 is for phases 1 to 4"):
        phase_job(6, latent_noise=0.1, **DECODERS[6])
    with pytest.raises(ValueError, match="give --vf-encoder-path"):
        FSAEObjective(phase_job(4), CPU)
    assert not phase_job(1).uses_gan and phase_job(2).uses_gan and not phase_job(2, gan_weight=0.0).uses_gan
    assert [n for n in range(1, 7) if phase_job(n, **DECODERS.get(n, {})).uses_vf] == [4]
