"""One flipped bit anywhere in a checkpoint is found before anything is unpickled, and told in one line."""

import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fsvideo.checkpoint.checksums import checksums_of, read_checksums, write_checksums
from megatron_fsvideo.checkpoint.distributed import open_checkpoint
from megatron_fsvideo.checkpoint.distributed_weights import DistributedWeights
from megatron_fsvideo.checkpoint.release import load_fsae

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("old")
    for name in ("old_dit", "old_fsae"):
        with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
    return {"dit": folder / "dit", "fsae": folder / "fsae"}


def flipped(path: Path, number: int, seed: int) -> Iterator[str]:
    """The file with one other bit flipped each time; as it was at the end."""
    content, choice = path.read_bytes(), random.Random(f"{path.name} {seed}")
    try:
        for _ in range(number):
            place, bit = choice.randrange(len(content)), choice.randrange(8)
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ 1 << bit]))
            yield f"{path.name}: bit {bit} of byte {place}"
            with path.open("r+b") as file:
                file.seek(place)
                file.write(content[place : place + 1])
    finally:
        path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_everywhere(folder: Path, number: int) -> None:
    before = open_checkpoint(folder)
    for path in files(folder):
        for where in flipped(path, number, seed=0):
            try:
                found = open_checkpoint(folder)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 500, (where, error)
            else:
                # White space after the number in the text file means nothing.
                assert path.name == "latest_checkpointed_iteration.txt" and found == before, where


def test_a_flipped_bit_is_found(folders):
    for folder in folders.values():
        flip_everywhere(folder, 80)


@pytest.mark.slow
def test_two_thousand_flipped_bits_in_each_file_are_found(folders):
    for folder in folders.values():
        flip_everywhere(folder, 2000)


def forge_and_load(folder: Path, number: int) -> None:
    """Whoever can forge checksums gets no traceback and runs no code either."""
    checkpoint = open_checkpoint(folder).path
    original = read_checksums(checkpoint)
    for path in files(checkpoint):
        if path.name == "checksums.json":
            continue
        for where in flipped(path, number, seed=1):
            write_checksums(checkpoint, original | checksums_of(checkpoint, [str(path.relative_to(checkpoint))]))
            started = time.monotonic()
            try:
                if (checkpoint / "model").is_dir():
                    load_fsae(folder)
                else:
                    stored = DistributedWeights(open_checkpoint(folder).path, "ema.")
                    for name in list(stored.infos)[:5]:
                        stored.read(name)
            except ValueError as error:
                assert "\n" not in str(error), (where, error)
            assert time.monotonic() - started < 10, where
    write_checksums(checkpoint, original)


def test_a_forged_checkpoint_is_one_line_or_loads(folders):
    for folder in folders.values():
        forge_and_load(folder, 3)


@pytest.mark.slow
def test_a_thousand_forged_checkpoints_are_one_line_or_load(folders):
    for folder in folders.values():
        forge_and_load(folder, 150)
