"""Checkpoints and releases of format 1, written before networks had sections: their weights and averages still load.

tests/golden/old_dit.tar.xz holds a run's folder and two releases made from it then: of its average and of its weights.
"""

import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.checkpoint.release import load_fsae
from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, DiTJob, DiTParallelConfig, FSAEJob, build_job
from megatron_fsvideo.inference.loading import load_dit
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.tasks.fsae.task import FSAETask
from megatron_fsvideo.training.run import begin, checkpoints_of
from tests.functional.tasks import begin_dit
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers
from tests.unit.test_fsae_training import make_film

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = {"hidden_size": 12, "ffn_hidden_size": 12, "num_attention_heads": 2, "freq_dim": 8}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    for name in ("old_dit", "old_fsae"):
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_film(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_dataset(tmp_path_factory.mktemp("data"))


def load_step(
    data: Path, folder: Path, tp_size: int, finetune: bool, new_stage: bool = False
) -> list[list[torch.Tensor]]:
    """What a training run has in memory after loading: its weights and their average."""
    values = SIZE | {"data_path": (str(data),), "load": str(folder), "finetune": finetune, "new_stage": new_stage}
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"] | values | {"tensor_model_parallel_size": tp_size})
    task, _, state = begin_dit(job, groups.initialize(job.parallel))
    assert (state.iteration, state.consumed_samples) == (0, 0)
    network = task.network
    trained = {name: parameter.detach().clone() for name, parameter in network.chunks.named_parameters()}
    averages = [network.average.weights[name].view_as(weight) for name, weight in trained.items()]
    return [list(trained.values()), averages]


def generated_from(folder: Path, tp_size: int, use_ema: bool) -> list[torch.Tensor]:
    parallel = DiTParallelConfig(tensor_model_parallel_size=tp_size)
    dit = load_dit(folder, parallel, groups.initialize(parallel), use_ema)
    assert dit.iteration == 3 and dit.network.diffusion.huber_c == 0.03
    return [p.detach().clone() for p in dit.model.parameters()]


def both_releases(old: Path) -> list[list[torch.Tensor]]:
    """The trained and the averaged weights, whole, from releases that were made when the checkpoint was."""
    found = []
    for kind in ("trained", "average"):
        found.append(generated_from(old / f"dit_release_{kind}", 1, True))
        groups.shutdown()
    return found


def slice_of(whole: torch.Tensor, part: torch.Tensor, rank: int) -> torch.Tensor:
    """What of a whole weight a tensor-parallel rank has, from the shape of its part."""
    for dim, size in enumerate(part.shape):
        if size != whole.shape[dim]:
            return whole.narrow(dim, rank * size, size)
    return whole


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 50
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_and_average_of_an_old_dit_load(tp_size, old, data):
    trained, average = run_workers(both_releases, 1, old)[0]
    assert not all(torch.equal(a, b) for a, b in zip(trained, average, strict=True))
    for folder, expected in (("dit", (trained, average)), ("dit_release_average", (average, average))):
        # A release holds one set of weights, at which the average begins.
        for rank, found in enumerate(run_workers(load_step, tp_size, data, old / folder, tp_size, True)):
            for values, wanted in zip(found, expected, strict=True):
                assert_equal(values, [slice_of(w, v, rank) for w, v in zip(wanted, values, strict=True)])
    for use_ema, expected in ((True, average), (False, trained)):
        for rank, values in enumerate(run_workers(generated_from, tp_size, old / "dit", tp_size, use_ema)):
            assert_equal(values, [slice_of(w, v, rank) for w, v in zip(expected, values, strict=True)])


@pytest.mark.parametrize("new_stage", [False, True], ids=["resume", "new_stage"])
def test_a_full_resume_of_an_old_dit_is_refused_in_one_line(new_stage, old, data):
    with pytest.raises(AssertionError, match="written by an earlier version of this program, whose optimizer state"):
        run_workers(load_step, 1, data, old / "dit", 1, False, new_stage)


FSAE = {"widths": (2, 2, 4), "latent_channels": 2, "attention_head_dim": 4, "ema_decay": 0.9, "phase": 2}
FSAE |= {"discriminator_width": 4, "discriminator_scales": 1, "discriminator_layers": 1, "global_batch_size": 1}


def load_fsae_task(films: Path, **flags: object) -> dict[str, dict[str, torch.Tensor]]:
    """The autoencoder's weights and their average in a training run after loading."""
    job = build_job(FSAEJob, FSAE_PRESETS["fsae_debug"] | FSAE | {"video_dir": str(films)} | flags)
    pgs = groups.initialize(job.parallel)
    task = FSAETask(job, pgs)
    state = begin(task, checkpoints_of(job, task, pgs))
    assert (state.iteration, state.consumed_samples) == (0, 0)
    model = task.learner.model
    found = {"weights": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    with task.learner.fsae.averaged():
        found["ema"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return found


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_and_average_of_an_old_autoencoder_load(old, films):
    saved = torch.load(old / "fsae" / "iter_0000002" / "training.pt", weights_only=True)
    average = load_fsae(old / "fsae").state_dict()
    assert not torch.equal(saved["weights"]["encoder.stem.weight"], average["encoder.stem.weight"])
    (finetuned,) = run_workers(partial(load_fsae_task, load=str(old / "fsae"), finetune=True), 1, films)
    assert_equal_states(finetuned["weights"], saved["weights"])
    assert_equal_states(finetuned["ema"], average)
    (inherited,) = run_workers(partial(load_fsae_task, init_from=str(old / "fsae")), 1, films)
    assert_equal_states(inherited["weights"], average)


def test_a_full_resume_of_an_old_autoencoder_is_refused_in_one_line(old, films):
    with pytest.raises(AssertionError, match="written by an earlier version of this program, whose optimizer state"):
        run_workers(partial(load_fsae_task, load=str(old / "fsae")), 1, films)
