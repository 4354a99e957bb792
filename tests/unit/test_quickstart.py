"""The quickstart's driver and its report, without the minutes of training between them."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_fsvideo.checkpoint.release import save_fsae
from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, FSAEJob, build_job
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.models.fsae import FSAE
from tests.unit.test_examples import parser_of

ROOT = Path(__file__).parents[2]
SIDE, FRAMES, TRAVEL = 64, 5, 16
MOVES = {"left": (0, 1), "right": (0, -1), "up": (1, 0), "down": (-1, 0)}  # of the content


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", ROOT / "examples" / "quickstart" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class FakeShell:
    """Records commands instead of running them; the phase called `failing` ends with exit code 3."""

    def __init__(self, failing: str = "") -> None:
        self.commands: list[list[str]] = []
        self.failing = failing

    def run(self, words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        assert int(env["OMP_NUM_THREADS"]) >= 1
        self.commands.append(words)
        code = 3 if self.failing and any(self.failing in word for word in words) else 0
        return subprocess.CompletedProcess(words, code)


def script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    position = next(k for k, word in enumerate(words) if word.endswith(".py"))
    return words[position], words[position + 1 :]


@pytest.fixture
def driver(monkeypatch):
    """run.py and the shell that it runs commands in."""
    module, shell = load("run"), FakeShell()
    monkeypatch.setattr(subprocess, "run", shell.run)
    return module, shell


@pytest.mark.parametrize("long", [False, True])
def test_every_command_parses_and_is_printed_as_a_user_types_it(driver, tmp_path, capsys, long):
    module, shell = driver
    module.quickstart(module.QuickstartFlags(str(tmp_path), long=long))
    scripts = []
    for words in shell.commands:
        script, arguments = script_and_arguments(words)
        parser_of(script).parse_args(arguments)
        scripts.append(Path(script).name)
    assert scripts[:2] == ["fetch_clips.py", "pretrain_fsae.py"] and scripts[-2:] == ["generate.py", "report.py"]
    assert scripts.index("preprocess_latents.py") < scripts.index("pretrain_dit.py") < scripts.index("generate.py")
    # The report compares the validation errors at the start and at the end.
    (training,) = (words for words in shell.commands if "pretrain_dit.py" in words)
    assert int(vars(parser_of("pretrain_dit.py").parse_args(script_and_arguments(training)[1]))["eval_iters"]) > 0
    printed = [shlex.split(line[2:]) for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    assert [script_and_arguments(words) for words in printed] == [script_and_arguments(w) for w in shell.commands]
    assert {words[0] for words in printed} == {"python", "torchrun"}


def test_long_trains_longer_than_the_presets(driver, tmp_path):
    module, shell = driver
    module.quickstart(module.QuickstartFlags(str(tmp_path), long=True))
    presets = {"pretrain_dit.py": DIT_PRESETS["dit_quickstart"], "pretrain_fsae.py": FSAE_PRESETS["fsae_quickstart"]}
    commands = dict(script_and_arguments(words) for words in shell.commands)
    for script, preset in presets.items():
        assert int(vars(parser_of(script).parse_args(commands[script]))["train_iters"]) > preset["train_iters"]


def test_a_failed_phase_stops_and_finished_ones_are_skipped(driver, tmp_path):
    module, shell = driver
    shell.failing = "pretrain_dit.py"
    with pytest.raises(SystemExit, match="train_dit"):
        module.quickstart(module.QuickstartFlags(str(tmp_path)))
    shell.failing = ""
    shell.commands.clear()
    module.quickstart(module.QuickstartFlags(str(tmp_path)))
    assert Path(script_and_arguments(shell.commands[0])[0]).name == "pretrain_dit.py"


def scripts_of(shell: FakeShell) -> list[str]:
    return [Path(script_and_arguments(words)[0]).name for words in shell.commands]


def test_other_commands_or_inputs_are_run_anew_and_what_they_made_is_removed(driver, tmp_path):
    module, shell = driver
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    (films / "a.mp4").write_bytes(b"one film")

    def run(**flags) -> list[str]:
        shell.commands.clear()
        module.quickstart(module.QuickstartFlags(str(out), **flags))
        return scripts_of(shell)

    assert run()[:2] == ["fetch_clips.py", "pretrain_fsae.py"]
    (out / "fsae").mkdir()
    (out / "fsae" / "latest_checkpointed_iteration.txt").touch()
    assert run() == []
    # Longer, then with own films: nothing may continue what was trained otherwise.
    everything = run(long=True)
    assert everything[0] == "pretrain_fsae.py" and everything[-1] == "report.py" and not (out / "fsae").exists()
    assert run(video_dir=str(films))[0] == "pretrain_fsae.py"
    assert run(video_dir=str(films)) == []
    (films / "b.mp4").write_bytes(b"another film")
    assert run(video_dir=str(films))[0] == "pretrain_fsae.py"


def test_an_interrupted_phase_continues_with_its_command_only(driver, tmp_path):
    module, shell = driver
    shell.failing = "pretrain_dit.py"
    for long, kept in ((False, True), (False, True), (True, False)):
        (tmp_path / "dit").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match="train_dit"):
            module.quickstart(module.QuickstartFlags(str(tmp_path), long=long))
        assert (tmp_path / "dit").exists() == kept


def test_own_videos_are_not_fetched(driver, tmp_path):
    module, shell = driver
    module.quickstart(module.QuickstartFlags(str(tmp_path / "out"), video_dir="films"))
    assert not any("fetch_clips" in word for words in shell.commands for word in words)
    assert any("films" in words for words in shell.commands)


def pans(seed: int) -> dict[str, torch.Tensor]:
    """One random still, four clips in which the content moves."""
    coarse = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    still = torch.nn.functional.interpolate(coarse, size=SIDE + 2 * TRAVEL, mode="bicubic").clamp(0, 1)[0]
    still = (still * 255).to(torch.uint8).permute(1, 2, 0)
    clips = {}
    for direction, (dy, dx) in MOVES.items():
        corners = [TRAVEL * k // (FRAMES - 1) for k in range(FRAMES)]
        frames = [
            still[TRAVEL - dy * k : TRAVEL - dy * k + SIDE, TRAVEL - dx * k : TRAVEL - dx * k + SIDE] for k in corners
        ]
        clips[direction] = torch.stack(frames)
    return clips


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder that the quickstart's phases leave before `report`, with one case's generation going wrong."""
    lines, clips = [], []
    for seed in range(2):
        for direction, clip in pans(seed).items():
            start = FRAMES * len(clips)
            line = {"path": "heldout.mp4", "start": start, "num_frames": FRAMES, "caption": f"pan {direction}"}
            lines.append(line | {"direction": direction, "split": "heldout"})
            clips.append(clip)
    (tmp_path / "pans").mkdir()
    write_video(tmp_path / "pans" / "heldout.mp4", torch.cat(clips), fps=8, quality=6)
    lines.append({**lines[0], "split": "train"})
    (tmp_path / "pans" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    save_fsae(tmp_path / "fsae", FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model))
    (tmp_path / "fsae-evaluation").mkdir()
    (tmp_path / "fsae-evaluation" / "evaluation.json").write_text('{"psnr": 25.0}')
    seconds = {"train_fsae": 10.0, "train_dit": 20.0}
    phases = {name: {"key": "", "seconds": value} for name, value in seconds.items()}
    (tmp_path / "phases.json").write_text(json.dumps(phases | {"report": {"key": "", "seconds": None}}))
    (tmp_path / "dit-logs").mkdir()
    rows = [{"iteration": k, "loss": 1 / k} for k in (1, 2)]
    rows += [
        {"iteration": k, "validation_velocity_mse": mse, "validation_white_latents_bound": 2.0}
        for k, mse in ((0, 2.5), (2, 1.5))
    ]
    (tmp_path / "dit-logs" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_report(finished):
    module = load("report")
    module.report(module.ReportFlags(str(finished), only_requests=True))
    requests = [json.loads(line) for line in (finished / "requests.jsonl").read_text().splitlines()]
    assert len(requests) == 8 and all((finished / request["image"]).is_file() for request in requests)
    assert len({request["seed"] for request in requests}) == 8
    cases = module.heldout_cases(finished)
    for k, (request, case) in enumerate(zip(requests, cases, strict=True)):
        # The first goes the wrong way: played backwards. The last stands still.
        clip = case.truth.flip(0) if k == 0 else case.truth[:1].expand_as(case.truth) if k == 7 else case.truth
        write_video(finished / request["out"], clip, fps=8, quality=6)
    module.report(module.ReportFlags(str(finished)))
    report = json.loads((finished / "report.json").read_text())
    generation = report["generation"]
    assert generation["cases"] == 8 and generation["truth_direction_agreement"] == 1
    assert generation["direction_agreement"] == 6 / 8
    assert generation["psnr_gain_over_repeat"] > 5
    assert report["dit"]["validation_mse_start"] == 2.5 and report["dit"]["validation_mse_below_bound"] == 0.25
    assert report["seconds"]["total"] == 30 and report["autoencoder"]["psnr"] == 25
    assert (finished / "contact_sheet.png").is_file() and (finished / "sample.mp4").is_file()
