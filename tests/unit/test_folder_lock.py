"""Two processes do not write into one folder; a lock whose holder is gone is named and taken over."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from megatron_fsvideo.data.folder_lock import LOCK_FILE, FolderLock, FolderLockedError

CONTEXT = multiprocessing.get_context("fork")


def hold(folder: Path, ready, release) -> None:
    lock = FolderLock(folder, "training")
    lock.acquire()
    ready.set()
    release.wait(30)
    lock.release()
    os._exit(0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run, and what lets it go."""
    ready, release = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(tmp_path / "run", ready, release))
    process.start()
    assert ready.wait(30)
    yield process, release
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_told_who_holds_it(holder, tmp_path):
    process, release = holder
    with pytest.raises(FolderLockedError) as error:
        FolderLock(tmp_path / "run", "training").acquire()
    message = str(error.value)
    assert f"process {process.pid} on {os.uname().nodename} (training, since 20" in message and "\n" not in message
    release.set()
    process.join(30)
    FolderLock(tmp_path / "run", "encoding").acquire()


def test_the_lock_of_a_killed_process_is_taken_over_and_named(holder, tmp_path, capfd):
    process, _ = holder
    process.kill()
    process.join()
    lock = FolderLock(tmp_path / "run", "training")
    lock.acquire()
    assert f"was locked by process {process.pid} on" in capfd.readouterr().err
    lock.check()
    lock.release()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_shows_by_its_beats(lives, tmp_path):
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({"host": "elsewhere", "process": 1, "started": 0.0, "since": "then", "purpose": "x"}))

    def beat() -> None:
        for _ in range(100):
            time.sleep(0.05)
            os.utime(path)

    other = CONTEXT.Process(target=beat if lives else int)
    other.start()
    lock = FolderLock(tmp_path, "training", beat=0.1)
    if lives:
        with pytest.raises(FolderLockedError, match=r"process 1 on elsewhere \(x, since then\)"):
            lock.acquire()
    else:
        lock.acquire()
        lock.check()
    other.kill()
    other.join()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 10000, '{"host": null, "process": "x"}'])
def test_a_damaged_lock_is_taken_over(content, tmp_path):
    (tmp_path / LOCK_FILE).write_text(content)
    lock = FolderLock(tmp_path, "training", beat=0.02)
    lock.acquire()
    lock.check()


def test_a_process_that_lost_its_lock_stops_writing(tmp_path):
    lock = FolderLock(tmp_path, "training")
    lock.acquire()
    lock.acquire()  # the same process may
    (tmp_path / LOCK_FILE).unlink()
    lock.check()
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "process": 1, "token": "other"}))
    with pytest.raises(FolderLockedError, match="was taken over by process 1 on elsewhere"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK_FILE).exists()


def test_ranks_of_one_job_share_a_folder_and_those_of_another_do_not(holder, tmp_path):
    with FolderLock(tmp_path / "run", "encoding", rank=3) as other:
        assert other.path.name == ".lock.3.json"
        with pytest.raises(FolderLockedError):
            FolderLock(tmp_path / "run", "encoding", rank=0).acquire()
    assert not other.path.exists()
