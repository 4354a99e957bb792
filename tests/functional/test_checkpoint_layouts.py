"""A checkpoint does not remember the layout it was saved from: the next losses are the same in any other."""

import shutil

import pytest

from megatron_fsvideo.checkpoint.save_folder import LATEST_FILE
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import Run, debug_arguments, losses, run_to_end
from tests.latent_fixtures import write_latent_dataset

SAVED, END = 3, 6
COMMON = f"--micro-batch-size 1 --global-batch-size 4 --train-iters {END} --lr 0.003 --weight-decay 0.1".split()
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
CP2 = ["--context-parallel-size", "2"]
SP = ["--sequence-parallel"]
DISTRIBUTED = ["--use-distributed-optimizer"]
MUON = ["--optimizer", "muon", "--muon-precision", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_latent_dataset(tmp_path_factory.mktemp("latents"))


def save_at(data, folder, extra, world_size):
    """A run to `END` with a checkpoint at `SAVED`; its losses. The folder then looks as if killed after `SAVED`."""
    arguments = debug_arguments(data, folder, *COMMON, *extra, "--save-interval", str(SAVED))
    run_to_end(arguments, folder.with_suffix(".log"), world_size)
    shutil.rmtree(folder / f"iter_{END:07d}")
    (folder / LATEST_FILE).write_text(f"{SAVED}\n")
    return losses(folder / "logs")


@pytest.fixture(scope="module")
def saved_at_dp2(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "dp2"
    return folder, save_at(data, folder, [], 2)


@pytest.fixture(scope="module")
def muon_saved_at_dp2(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "muon"
    return folder, save_at(data, folder, [*MUON, *DISTRIBUTED], 2)


def continue_in(data, source, target, extra, world_size):
    shutil.copytree(source, target)
    run_to_end(debug_arguments(data, target, *COMMON, *extra), target.with_suffix(".log"), world_size)
    return losses(target / "logs")


@pytest.mark.parametrize(
    ("extra", "world_size"),
    [([], 1), (TP2 + SP, 2), (PP2, 2), (CP2, 2)],
    ids=["one_process", "tp2_sp", "pp2", "cp2"],
)
def test_saved_at_dp2(extra, world_size, data, saved_at_dp2, tmp_path):
    folder, expected = saved_at_dp2
    got = continue_in(data, folder, tmp_path / "continued", extra, world_size)
    assert got.keys() == expected.keys()
    for iteration in range(1, END + 1):
        assert got[iteration] == pytest.approx(expected[iteration], rel=1e-6), iteration


@pytest.mark.parametrize(("extra", "world_size"), [([], 1), (TP2, 2)], ids=["one_process", "tp2"])
def test_distributed_optimizer_saved_at_dp2(extra, world_size, data, tmp_path):
    expected = save_at(data, tmp_path / "saved", DISTRIBUTED, 2)
    got = continue_in(data, tmp_path / "saved", tmp_path / "continued", DISTRIBUTED + extra, world_size)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("extra", "world_size"), [([], 1), (TP2, 2), ([*DISTRIBUTED, *TP2], 4)], ids=["one_process", "tp2", "tp2_dp2"]
)
def test_muon_with_the_distributed_optimizer_saved_at_dp2(extra, world_size, data, muon_saved_at_dp2, tmp_path):
    folder, expected = muon_saved_at_dp2
    got = continue_in(data, folder, tmp_path / "continued", [*MUON, *extra], world_size)
    assert got == pytest.approx(expected, rel=1e-5)


def test_muon_in_bf16_with_the_distributed_optimizer_continues_exactly(data, tmp_path):
    flags = ["--optimizer", "muon", "--bf16", *DISTRIBUTED]
    expected = save_at(data, tmp_path / "saved", flags, 2)
    assert continue_in(data, tmp_path / "saved", tmp_path / "continued", flags, 2) == expected


def test_distributed_optimizer_with_several_buckets(data, tmp_path):
    """With stages each embedder has a bucket of its own."""
    flags = [*DISTRIBUTED, *PP2, "--bf16"]
    expected = save_at(data, tmp_path / "saved", flags, 2)
    assert continue_in(data, tmp_path / "saved", tmp_path / "continued", flags, 2) == expected


@pytest.mark.parametrize(("kind", "bf16"), [("muon", "--no-bf16"), ("muon", "--bf16"), ("adam", "--bf16")])
def test_saved_at_tp2_continues_in_one_process_and_exactly_at_tp2(kind, bf16, data, tmp_path):
    flags = ["--optimizer", kind, bf16]
    expected = save_at(data, tmp_path / "saved", flags + TP2, 2)
    got = continue_in(data, tmp_path / "saved", tmp_path / "continued", flags, 1)
    assert got == pytest.approx(expected, rel=1e-5 if bf16 == "--no-bf16" else 2e-2)
    again = continue_in(data, tmp_path / "saved", tmp_path / "again", flags + TP2, 2)
    assert again == expected


def test_another_micro_batch_and_no_average(data, saved_at_dp2, tmp_path):
    folder, expected = saved_at_dp2
    extra = ["--micro-batch-size", "2", "--ema-decay", "0"]
    got = continue_in(data, folder, tmp_path / "continued", extra, 1)
    assert got == pytest.approx(expected, rel=1e-6)


def test_finetune_takes_the_weights_then_continues_itself(data, saved_at_dp2, tmp_path):
    folder, expected = saved_at_dp2
    target = tmp_path / "finetuned"
    argv = debug_arguments(data, target, *COMMON, "--finetune", "--exit-interval", "2")
    argv[argv.index("--load") + 1] = str(folder)
    run_to_end(argv, tmp_path / "log")
    first = losses(target / "logs")
    # The first batch again, with weights that have seen it.
    assert list(first) == [1, 2] and first[1] < expected[1]
    run_to_end(argv, tmp_path / "log")
    assert list(losses(target / "logs")) == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", [[], DISTRIBUTED], ids=["adam", "distributed_optimizer"])
def test_virtual_stages_train_save_resume_and_load_in_one_process(optimizer, data, tmp_path):
    """With validation and the averaged weights, which all chunks of a rank take part in."""
    common = [*COMMON, *optimizer, "--num-layers", "4", "--valid-data-path", str(data), "--eval-iters", "1"]
    virtual = [*PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
    run_to_end(debug_arguments(data, tmp_path / "alone", *common), tmp_path / "log")
    expected = metrics(tmp_path / "alone")
    found = save_at(data, tmp_path / "virtual", [*common, *virtual], 2)
    assert metrics(tmp_path / "virtual") == pytest.approx(expected, rel=1e-5)
    again = continue_in(data, tmp_path / "virtual", tmp_path / "again", [*common, *virtual], 2)
    assert again == found
    continue_in(data, tmp_path / "virtual", tmp_path / "one_process", common, 1)
    assert metrics(tmp_path / "one_process") == pytest.approx(expected, rel=1e-5)


def test_virtual_stages_need_whole_groups_of_micro_batches(data, tmp_path):
    flags = [*COMMON, "--num-layers", "4", *PP2, "--num-virtual-stages-per-pipeline-rank", "2"]
    run = Run(debug_arguments(data, tmp_path / "run", *flags, "--global-batch-size", "3"), tmp_path / "log", 2)
    code, text = run.wait()
    assert code != 0 and "data-parallel size 1 x pipeline size (virtual stages) 2 x micro_batch_size 1 = 2" in text


def metrics(folder):
    """Losses, gradient norms and validation errors of a run."""
    rows = read_metrics(folder / "logs" / METRICS_FILE)
    names = ("loss", "grad_norm", "validation_velocity_mse")
    return {f"{row['iteration']} {name}": row[name] for row in rows for name in names if name in row}
