"""Whatever happens to a run, it goes on from its last good state with the losses of a run that nothing happened to."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.save_folder import LATEST_FILE, iteration_folder, latest_iteration
from megatron_fsvideo.data.folder_lock import LOCK_FILE
from megatron_fsvideo.data.latent_shards import hash_key
from megatron_fsvideo.training.logging import METRICS_FILE, read_metrics
from tests.functional.runs import Run, debug_arguments, run_to_end
from tests.functional.test_resume import wait_for_first_line
from tests.latent_fixtures import write_latent_dataset

TRAIN_ITERS = 16
NAN_SAMPLE = 5
# A high rate, so that an iteration done twice, or a forgotten optimizer moment, shows in the loss.
FLAGS = f"--train-iters {TRAIN_ITERS} --lr 0.01 --lr-warmup-iters 2 --keep-checkpoints 3".split()
DATA_PARALLEL = "--use-distributed-optimizer --micro-batch-size 1".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples, batches of 2: each is seen once in 12 iterations, and one of them holds a NaN."""
    return write_latent_dataset(tmp_path_factory.mktemp("data"), nan_sample=NAN_SAMPLE)


def arguments(data: Path, folder: Path, *more: str) -> list[str]:
    return debug_arguments(data, folder, *FLAGS, *DATA_PARALLEL, *more)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What every iteration of a run logs that nothing interrupts, on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_to_end(arguments(data, folder), folder / "log", 2)
    rows = logged(folder)
    assert [row["iteration"] for row in rows] == list(range(1, TRAIN_ITERS + 1))
    return rows


def logged(folder: Path) -> list[dict]:
    """What every iteration's line says, but for its timings."""
    names = ("iteration", "consumed_samples", "loss", "grad_norm", "learning_rate", "skipped")
    return [{name: row.get(name) for name in names} for row in read_metrics(folder / "logs" / METRICS_FILE)]


def test_a_broken_sample_costs_one_step_and_is_named(unbroken: list[dict]) -> None:
    skipped = [row for row in unbroken if row["skipped"]]
    assert 1 <= len(skipped) <= 2
    for row in skipped:
        assert row["loss"] is None and "the loss is nan" in row["skipped"]
        assert row["skipped"].endswith(f"samples (1 of 2 in the batch): {hash_key('sample', 0, NAN_SAMPLE)}")
    others = [row for row in unbroken if not row["skipped"]]
    assert len({row["loss"] for row in others}) == len(others)
    assert all(row["loss"] < 10 and row["grad_norm"] > 0 for row in others)


def test_nothing_but_broken_samples_stops_the_run(tmp_path: Path) -> None:
    data = write_latent_dataset(tmp_path / "data", num_samples=2, nan_sample=1)
    folder = tmp_path / "run"
    more = ["--max-consecutive-skipped", "3", "--save-interval", "2"]
    code, text = Run(arguments(data, folder, *more), tmp_path / "log", 2).wait()
    last = text.strip().splitlines()[-1]
    assert code == 1 and "3 optimizer steps in a row" in last and hash_key("sample", 0, 1) in last
    assert latest_iteration(folder) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_saves_and_leaves(data: Path, unbroken: list[dict], tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    run = Run(arguments(data, folder), tmp_path / "log", 2)
    wait_for_first_line(run, folder / "logs" / METRICS_FILE)
    os.kill(run.ranks[rank].pid, signal.SIGUSR1 if rank else signal.SIGTERM)
    code, text = run.wait()
    assert (code, [process.exitcode for process in run.ranks]) == (0, [0, 0]), text
    reached = named(folder)
    assert reached == len(logged(folder)) < TRAIN_ITERS
    run_to_end(arguments(data, folder), tmp_path / "log", 2)
    assert logged(folder) == unbroken


def test_two_runs_do_not_save_into_one_folder(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = Run(arguments(data, folder), tmp_path / "log", 2)
    wait_for_first_line(run, folder / "logs" / METRICS_FILE)
    os.kill(run.ranks[0].pid, signal.SIGSTOP)
    code, text = Run(arguments(data, folder), tmp_path / "second", 2).wait()
    os.kill(run.ranks[0].pid, signal.SIGCONT)
    last = text.strip().splitlines()[-1]
    assert code == 1 and f"{folder} is in use by process {run.ranks[0].pid} on" in last, text
    run.kill()
    run_to_end([*arguments(data, folder), "--exit-interval", "1"], tmp_path / "third", 2)
    assert f"was locked by process {run.ranks[0].pid}" in (tmp_path / "third").read_text()
    assert not (folder / LOCK_FILE).exists()


@pytest.mark.parametrize("how", ["--async-save", "--no-async-save"])
def test_killed_then_damaged_then_no_room(how: str, data: Path, unbroken: list[dict], tmp_path: Path) -> None:
    """A kill within a save, a flipped byte of the newest checkpoint, a disk that refuses to go on."""
    folder = tmp_path / "run"
    argv = arguments(data, folder, "--save-interval", "3", how)
    kill_within_a_save(Run(argv, tmp_path / "killed", 2), folder, past=6)
    reached = named(folder)
    assert reached < TRAIN_ITERS

    damage(folder, reached, flip=True)
    run = Run(argv, tmp_path / "damaged", 2)
    wait_for_the_folder(run, iteration_folder(folder, reached))
    refuse_to_write(run)
    code, text = run.wait()
    assert f"Continuing from iteration {reached - 3}, the newest" in text and "checksum" in text, text
    last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: the checkpoint of iteration"), text
    assert "File too large (rank 0)" in last and "is kept" in last
    kept = latest_iteration(folder)
    assert f"the one of iteration {kept} is kept" in last
    assert f"of iteration {kept + 3} could" in last and not iteration_folder(folder, kept + 3).exists()

    run_to_end(argv, tmp_path / "last", 2)
    assert logged(folder) == unbroken


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    data: Path, unbroken: list[dict], tmp_path: Path, small_disk: Path
) -> None:
    """5 MB, and 2 MB for each checkpoint: the third one has no room."""
    folder = small_disk / "run"
    argv = arguments(data, folder, "--save-interval", "4")
    code, text = Run(argv, tmp_path / "log", 2).wait()
    last = text.strip().splitlines()[-1]
    assert code == 1 and "No space left on device" in last, text
    assert (
        re.search(r"it needs 2\.\d\d MB, [01]\.", last)
        and "MB are free" in last
        and "the one of iteration 8 is kept" in last
    )
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000004", "iter_0000008"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run_to_end(argv, tmp_path / "log", 2)
    assert logged(folder) == unbroken


def test_a_truncated_only_checkpoint_is_not_silently_a_fresh_start(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = arguments(data, folder, "--exit-interval", "1")
    run_to_end(argv, tmp_path / "log", 2)
    damage(folder, 1)
    code, text = Run(argv, tmp_path / "again", 2).wait()
    assert code == 1 and "iter_0000001" in text.strip().splitlines()[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def named(folder: Path) -> int:
    """Iteration of the newest checkpoint, 0 before the first; the first may be complete and not named yet."""
    latest = folder / LATEST_FILE
    return int(latest.read_text()) if latest.exists() else 0


def kill_within_a_save(run: Run, folder: Path, past: int) -> None:
    """SIGKILL to all ranks while they write a folder that is not named the newest yet, after iteration `past`."""
    left_over = {path: path.stat().st_mtime_ns for path in folder.glob("iter_*")}
    while True:
        newest = named(folder)
        unnamed = [path for path in folder.glob("iter_*") if path > iteration_folder(folder, newest)]
        if newest >= past and [path for path in unnamed if changed_since(path, left_over.get(path))]:
            break
        assert run.alive, run.log.read_text()
        time.sleep(0.001)
    run.kill()


def wait_for_the_folder(run: Run, target: Path) -> None:
    """Until a checkpoint is written anew over the damaged one."""
    damaged = target.stat().st_mtime_ns
    while not changed_since(target, damaged):
        assert run.alive, run.log.read_text()
        time.sleep(0.001)


def changed_since(path: Path, mtime: int | None) -> bool:
    try:
        return path.stat().st_mtime_ns != mtime
    except FileNotFoundError:
        return False  # between its removal and its return


def refuse_to_write(run: Run) -> None:
    """From now on a file cannot become larger than 100 kB: writes fail in the middle. (Rank 0 has all the files.)"""
    resource.prlimit(run.ranks[0].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))


def damage(folder: Path, iteration: int, flip: bool = False) -> None:
    """Flip one bit in the middle of a shard, or cut it there."""
    path = sorted(iteration_folder(folder, iteration).glob("*.distcp"))[0]
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 16
    path.write_bytes(content if flip else content[:middle])


@pytest.mark.slow
def test_forty_kills_a_full_disk_and_two_damaged_checkpoints(data: Path, unbroken: list[dict], tmp_path: Path) -> None:
    """After each, the losses are those of an unbroken run, and no more was done twice than the docs say."""
    choice = random.Random(0)
    interval = 2
    events = ["kill"] * 20 + ["kill within a save"] * 20 + ["no room", "cut", "flip"]
    choice.shuffle(events)
    folder = tmp_path / "run"
    for number, event in enumerate(events):
        if (named(folder)) >= TRAIN_ITERS - 2 * interval:
            run_to_end(arguments(data, folder, "--save-interval", str(interval)), tmp_path / "end", 2)
            assert logged(folder) == unbroken
            shutil.rmtree(folder)
        in_background = choice.random() < 0.5
        how = "--async-save" if in_background else "--no-async-save"
        argv = arguments(data, folder, "--save-interval", str(interval), how)
        reached = named(folder)
        metrics = folder / "logs" / METRICS_FILE
        before = metrics.stat().st_mtime_ns if metrics.exists() else None
        run = Run(argv, tmp_path / f"log{number}", 2)
        if event == "kill within a save":
            kill_within_a_save(run, folder, past=reached)
        elif event in ("cut", "flip"):
            # With one before it to fall back on.
            kill_within_a_save(run, folder, past=max(reached, interval) + interval)
        else:
            wait_for_first_line(run, metrics)
            time.sleep(choice.uniform(0, 1.0))
            if event == "no room":
                refuse_to_write(run)
                assert run.wait()[0] == 1
            run.kill()
        done, newest = len(logged(folder)), named(folder)
        # A run that was killed before it cut the log has the lines of the run before, of which more may be undone.
        if changed_since(metrics, before):
            assert done - newest <= interval * (2 if in_background else 1), (number, event)
        assert logged(folder) == unbroken[:done], (number, event)
        if event in ("cut", "flip"):
            damage(folder, newest, flip=event == "flip")
    run_to_end(argv, tmp_path / "end", 2)
    assert logged(folder) == unbroken
