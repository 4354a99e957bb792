"""How processes start and end: imports that cost little and say nothing, errors that are said once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_fsvideo.config import run_script

ROOT = Path(__file__).parents[2]
IMPORTS = """
import sys
import {first}
import megatron_fsvideo.optim.optimizer, megatron_fsvideo.models.dit, megatron_fsvideo.checkpoint.distributed
from megatron.core import jit
assert jit.jit_fuser is jit.noop_decorator
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, Megatron compiles")
@pytest.mark.parametrize("first", ["megatron_fsvideo.models.dit.layer", "megatron_fsvideo.parallel.groups"])
def test_megatron_is_imported_without_compiler_and_without_warnings(first):
    command = [sys.executable, "-c", IMPORTS.format(first=first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_functions_that_megatron_would_compile_still_compute():
    from megatron.core.fusions.fused_bias_gelu import bias_gelu
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from megatron.core.transformer.utils import erf_gelu

    x, bias = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(bias_gelu(bias, x), F.gelu(x + bias, approximate="tanh"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(erf_gelu(x), F.gelu(x))
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])


class Exit(Exception):
    """What os._exit does, where a test can see it."""


def ended(main: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Exit) as exit_info:
        run_script(main)
    return exit_info.value.args[0]


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("lr is odd"), 1, "error: lr is odd\n"),
        (PermissionError(13, "Permission denied", "a.json"), 1, "error: [Errno 13] Permission denied: 'a.json'\n"),
        (IsADirectoryError(21, "Is a directory", "a"), 1, "error: [Errno 21] Is a directory: 'a'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_a_script_ends_with_one_line(error, code, printed, monkeypatch, capsys):
    assert ended(raising(error), monkeypatch) == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize(("rank", "printed"), [("0", "error: lr is odd\n"), ("3", "")])
def test_under_torchrun_one_rank_prints_and_torchrun_has_the_line_of_each(rank, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", rank)
    assert ended(raising(ValueError("lr is odd")), monkeypatch) == 1
    assert capsys.readouterr().err == printed
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    assert json.loads((tmp_path / "error.json").read_text())["message"] == "error: lr is odd"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message == "error: lr is odd"


def test_torchrun_gets_the_traceback_of_a_defect(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
    assert "ZeroDivisionError" in json.loads((tmp_path / "error.json").read_text())["message"]


SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    if "run_script(main)" in path.read_text()
)
HELP = """
import contextlib, io, json, runpy, sys, time
found = {}
for script in sys.argv[1:]:
    for flag in ("--help", "--no-such-flag"):
        files = ["in.mp4", "out.mp4"] if "reconstruct" in script and flag != "--help" else []
        sys.argv = [script, *files, flag]
        out, err, code = io.StringIO(), io.StringIO(), None
        began = time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as left:
                code = left.code
        seconds = time.process_time() - began
        found[f"{script} {flag}"] = [code, out.getvalue(), err.getvalue(), seconds, "torch" in sys.modules]
print(json.dumps(found))
"""


def test_help_and_a_mistyped_flag_need_no_torch_and_half_a_second():
    assert {"pretrain_dit.py", "pretrain_fsae.py", "tools/generate.py"} <= set(SCRIPTS) and len(SCRIPTS) > 15
    command = [sys.executable, "-c", HELP, *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for call, (code, out, err, seconds, has_torch) in json.loads(done.stdout).items():
        assert not has_torch, f"{call} imports torch"
        assert seconds < 0.5, f"{call} takes {seconds:.2f} s of CPU"
        if call.endswith("--help"):
            assert code == 0 and max(map(len, out.splitlines())) < 120, call
        else:
            assert code == 2 and err.count("\n") == 1 and "--no-such-flag" in err, call
