"""The benchmark scripts at sizes of a second: what they count and what they write down, not how fast anything is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_fsvideo.benchmarking.peak_memory import peak_allocation
from megatron_fsvideo.kernels import torch_mixing
from tests.functional.cli import ROOT, run_cli
from tools.benchmark_fsae import CONTENDERS, BenchmarkFlags, contender_subject, count

SIZES = ["--preset", "dit_debug", "--bf16", "--image-length", "5"]


def test_evaluations_of_both_stages(tmp_path):
    grids = ["--base-grid", "2", "4", "4", "--base-steps", "2", "--refiner-grid", "2", "4", "8", "--refiner-steps", "3"]
    argv = [*SIZES, *grids, "--text-length", "8", "--runs", "2", "--peak-tflops", "0.5", "--json", tmp_path / "a.json"]
    result = run_cli("tools/benchmark_dit_inference.py", argv, tmp_path / "log")
    assert result.code == 0, result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    rows = figures["results"]
    assert [rows[name]["evaluations"] for name in ("base", "refiner", "sum")] == [4, 3, 7]
    assert [rows[name]["tokens"] for name in ("base", "refiner")] == [32, 64]
    assert len(rows["base"]["seconds_by_run"]) == 2
    for row in rows.values():
        assert row["mfu"] == pytest.approx(row["petaflop"] / 0.5e-3 / row["seconds"])
    assert not figures["is_table_4"] and figures["paper_seconds"] is None
    assert {"device", "cpu", "versions", "command", "commit"} <= set(figures["measurement"])


@pytest.mark.slow  # each contender imports Megatron
@pytest.mark.parametrize("resident", ["--resident", "--no-resident"])
def test_contenders_of_equal_size(tmp_path, resident):
    argv = [*SIZES, "--latent-grid", "2", "4", "4", "--rounds", "2", "--iterations", "1", "--warmup-iterations", "1"]
    argv += ["--num-threads", "1", "--json", str(tmp_path / "a.json"), resident]
    command = [sys.executable, str(ROOT / "tools" / "benchmark_dit_training.py"), *argv]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    ours, plain, theirs = (figures["results"][name] for name in ("ours", "ours_without_memory", "diffusers"))
    assert plain["num_parameters"] == theirs["num_parameters"]
    assert ours["num_parameters"] - plain["num_parameters"] == 2 * (48 + 1)  # the router of layer 2
    for row in (ours, plain, theirs):
        assert [len(turn) for turn in row["step_seconds_by_round"]] == [1, 1]
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["step_seconds"])
    assert set(figures["ratios"]) == {
        "ours_without_memory / diffusers",
        "ours / ours_without_memory",
        "ours / diffusers",
    }


LAYER_MEMORY = [
    "--hidden-size",
    "16",
    "--tokens",
    "12",
    "--micro-batch-size",
    "2",
    "--num-layers",
    "3",
    "--rounds",
    "2",
]


def test_kernels_of_layer_memory(tmp_path):
    result = run_cli(
        "tools/benchmark_layer_memory.py", [*LAYER_MEMORY, "--json", tmp_path / "a.json"], tmp_path / "log"
    )
    assert result.code == 0, result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    state, row, channels = 12 * 2 * 16 * 2, 12 * 2 * 4, 2 * 16 * 4  # bytes
    # Layers 2 and 3 read 2 and 3 states, write output and mix; logits, weights, mean and rstd belong to a row.
    mix = (5 + 2 * 2) * state + (2 * 5 + 2 * 2) * row + 2 * 2 * channels
    # gradient, mix and the mix's gradient beside the states; logits' gradient, weights, mean and rstd.
    backward = (5 + 2 * 3) * state + (2 * 5 + 2 * 2) * row + 2 * 3 * channels
    # X_2 and X_1 .. X_0 get gradients of 1, 2 and 2 reads, one from elsewhere, and are written.
    pull = (1 + 2 + 2 + 2 * 3) * state + 5 * row
    moved = {"mix": mix, "mix_backward": backward, "pull": pull, "forward": mix, "backward": backward + pull}
    assert figures["sizes"]["state_bytes"] == state
    assert figures["copy"]["bytes"] == 2 * 3 * state
    assert {name: found["bytes"] for name, found in figures["results"]["torch"].items()} == moved
    assert {name: found["bytes"] for name, found in figures["results"]["einsum"].items()} == {
        name: moved[name] for name in ("forward", "backward")
    }
    for found in figures["results"].values():
        for figure in found.values():
            assert len(figure["seconds_by_round"]) == 2
            assert figure["bytes_per_second"] == pytest.approx(figure["bytes"] / figure["seconds"])
            assert figure["of_copy"] == pytest.approx(figure["bytes_per_second"] / figures["copy"]["bytes_per_second"])
    assert {"device", "cpu", "versions", "command", "commit"} <= set(figures["measurement"])


@pytest.mark.parametrize("norm", ["raw", "normalized"])
def test_contenders_of_layer_memory_compute_the_same(norm):
    tool = load_script("tools/benchmark_layer_memory.py")
    flags = tool.BenchmarkFlags(
        hidden_size=16, tokens=12, micro_batch_size=2, num_layers=4, dtype="fp32", layer_memory_norm=norm
    )
    device = torch.device("cpu")
    case, watch = tool.make_case(flags, device), tool.Stopwatch(device)
    ours, gradients = tool.run_mixer(torch_mixing, case, tool.settings_of(flags), watch)
    theirs, expected = tool.run_einsum(case, tool.settings_of(flags), watch)
    assert len(gradients) == len(expected) == 4
    for found, other in zip([ours, *gradients], [theirs, *expected], strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    assert set(watch.seconds()) == {"forward", "mix", "backward", "mix_backward", "pull"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num-layers", "1"], "num_layers must be an integer of at least 2, got 1"),
        (["--implementations", "stack"], "invalid choice: 'stack' (choose from 'triton', 'torch', 'einsum')"),
        (["--implementations", "triton"], "need a CUDA device"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(argv, message, tmp_path):
    if "triton" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run_cli("tools/benchmark_layer_memory.py", argv, tmp_path / "log")
    assert result.code in (1, 2) and message in result.last_line


def load_script(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # each contender imports torch and diffusers
def test_autoencoders_on_the_same_clip(tmp_path):
    argv = ["--size", "debug", "--clip", "9", "64", "64", "--dtype", "fp32", "--rounds", "2", "--num-threads", "1"]
    argv += ["--contenders", "lite_tiled", "wan", "--tile-rows", "4", "--tile-columns", "4"]
    command = [sys.executable, str(ROOT / "tools" / "benchmark_fsae.py"), *argv, "--json", str(tmp_path / "a.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    ours, theirs = (figures["results"][name] for name in ("lite_tiled", "wan"))
    assert (ours["latent"], theirs["latent"]) == ([1, 4, 3, 8, 8], [1, 4, 3, 8, 8])
    for row in (ours, theirs):
        for phase in ("encode", "decode"):
            found = row[phase]
            assert [len(turn) for turn in found["seconds_by_round"]] == [1, 1]
            for clock, cpu in zip(found["seconds_by_round"], found["cpu_seconds_by_round"], strict=True):
                assert 0 < cpu[0] < 1.1 * clock[0] + 0.02  # one thread
            assert found["frames_per_second"] == pytest.approx(9 / found["seconds"])
            assert found["tflops"] == pytest.approx(found["flops"] / found["seconds"] / 1e12)
            assert found["weight_bytes"] == 4 * row["parameters"][phase]
            # The clip is 0.4 MB; activations are more, and the process holds them, the weights and libraries.
            assert 4e5 < found["activation_bytes"] < found["peak_memory_bytes"]
    ratio = figures["ratios"]["lite_tiled / wan"]["decode"]
    assert ratio["flops"] == pytest.approx(ours["decode"]["flops"] / theirs["decode"]["flops"])
    for what in ("seconds", "cpu_seconds"):
        assert ratio[what]["min"] <= ratio[what]["median"] <= ratio[what]["max"]
    assert {"device", "cpu", "versions", "command", "commit"} <= set(figures["measurement"])


def test_what_the_autoencoders_benchmark_counts():
    # A copy of 4 MB and its double, of which one is freed: 8 MB at the worst moment.
    x = torch.ones(1 << 20)
    assert peak_allocation(lambda: (x + 1).mul(2).sum(), torch.device("cpu"))[1] == pytest.approx(8 << 20, rel=1e-3)
    a, b = torch.ones(4, 8), torch.ones(8, 16)
    assert count(lambda: a @ b, torch.device("cpu"), (4, 16))["flops"] == 2 * 4 * 8 * 16
    with pytest.raises(ValueError, match=r"made \[4, 16\] instead of finite numbers \[4, 17\]"):
        count(lambda: a @ b, torch.device("cpu"), (4, 17))


def test_the_autoencoders_benchmark_refuses_what_does_not_fit_all():
    with pytest.raises(ValueError, match=r"8k\+1 frames and sides that are multiples of 64, got \(13, 256, 256\)"):
        BenchmarkFlags(clip=(13, 256, 256))
    with pytest.raises(ValueError, match="contenders must be .* one of standard, .* got .*other"):
        BenchmarkFlags(contenders=("lite", "other"))


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_autoencoder_makes_the_whole_clip(name):
    flags = BenchmarkFlags(size="debug", clip=(9, 64, 64), dtype="fp32", tile_rows=4, tile_columns=4, tile_latents=2)
    subject = contender_subject(flags, name, torch.device("cpu"))
    clip = torch.rand(1, 3, *flags.clip) * 2 - 1
    with torch.no_grad():
        latents = subject.encode(clip)
        features = None if subject.first_frame is None else subject.first_frame(clip[:, :, :1])
        assert latents.shape == subject.latent_shape(flags.clip)
        assert subject.decode(latents, features).shape == clip.shape


@pytest.mark.parametrize(
    "name, millions, teraflops",
    [
        ("lite", (494.7, 542.1), (8.11, 4.81)),
        ("wan", (53.6, 73.3), (5.69, 9.57)),
        ("ltx", (180.4, 238.8), (0.95, 1.02)),
    ],
)
def test_autoencoders_of_published_sizes(name, millions, teraflops):
    flags, meta = BenchmarkFlags(clip=(17, 256, 256)), torch.device("meta")
    subject = contender_subject(flags, name, meta)
    clip = torch.empty(1, 3, *flags.clip, device=meta, dtype=torch.bfloat16)
    features = None if subject.first_frame is None else subject.first_frame(clip[:, :, :1])
    latents = torch.empty(subject.latent_shape(flags.clip), device=meta, dtype=torch.bfloat16)
    counts = []
    for call in (lambda: subject.encode(clip), lambda: subject.decode(latents, features)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops() / 1e12)
    assert counts == pytest.approx(teraflops, abs=0.01)
    numbers = [sum(p.numel() for p in part.parameters()) / 1e6 for part in subject.parts]
    assert numbers == pytest.approx(millions, abs=0.05)
