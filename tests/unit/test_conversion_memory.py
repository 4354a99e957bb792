"""A conversion holds about one tensor in memory, not the model: 4 GB of weights, measured as the process's RssAnon."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_fsvideo.checkpoint.safetensors_shards import TensorInfo, write_shards
from megatron_fsvideo.config import DiTConfig
from tests.wan_fixtures import wan_config, wan_shapes

ROOT = Path(__file__).parents[2]
LIMIT = 1.5e9
CONFIG = DiTConfig(
    num_layers=26,
    hidden_size=2048,
    num_attention_heads=16,
    ffn_hidden_size=8192,
    latent_channels=16,
    patch_size=(1, 2, 2),
    layer_memory=False,
)


def write_large_wan(folder: Path) -> int:
    """A Wan checkpoint of random bf16 numbers, which repeat; its bytes."""
    noise = torch.randn(16 * 2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in wan_shapes(CONFIG).items()}

    def read(name: str) -> torch.Tensor:
        number = torch.Size(infos[name].shape).numel()
        return noise.repeat(-(-number // len(noise)))[:number].reshape(infos[name].shape)

    folder.mkdir()
    write_shards(folder, "diffusion_pytorch_model", infos, read, 10**9, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(wan_config(CONFIG)))
    return sum(info.num_bytes for info in infos.values())


def convert_measured(*argv: str | Path) -> float:
    """Run the tool; the largest RssAnon seen, in bytes."""
    process = subprocess.Popen([sys.executable, "tools/convert_checkpoint.py", *map(str, argv)], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.02)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
def test_four_gigabytes_convert_in_the_memory_of_a_tensor(tmp_path):
    assert write_large_wan(tmp_path / "wan") > 4e9
    steps = [("wan", "distributed"), ("distributed", "release"), ("release", "diffusers")]
    for before, after in steps:
        source, target = tmp_path / before, tmp_path / after
        began = time.perf_counter()
        peak = convert_measured("--input", source, "--output", target, "--output-format", after)
        print(f"{before} -> {after}: peak RssAnon {peak / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s")
        assert peak < LIMIT
