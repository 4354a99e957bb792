"""The benchmark scripts at sizes of a second: what they count and what they write down, not how fast anything is."""

import json
import subprocess
import sys

import pytest

from tests.functional.cli import ROOT, run_cli

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
