"""Every command in examples/ and in the documentation parses with the real parser of the script it calls."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fsvideo.config import (
    DIT_PRESETS,
    FSAE_PRESETS,
    DiTJob,
    FSAEJob,
    make_parser,
)

ROOT = Path(__file__).parents[2]
TRAINING = {"pretrain_dit.py": (DiTJob, DIT_PRESETS), "pretrain_fsae.py": (FSAEJob, FSAE_PRESETS)}
# Jobs that tools and quickstart scripts define for themselves.
OWN_JOBS = {
    "tools/preprocess_latents.py": "PreprocessJob",
    "tools/generate.py": "GenerateJob",
    "tools/evaluate_fsae.py": "EvaluateJob",
    "tools/list_samples.py": "ListJob",
    "tools/cut_clips.py": "CutJob",
    "tools/index_shots.py": "IndexJob",
    "tools/intrinsic_dimension.py": "DimensionJob",
    "tools/convert_checkpoint.py": "ConvertJob",
    "examples/quickstart/run.py": "QuickstartJob",
    "examples/quickstart/report.py": "ReportJob",
    "examples/quickstart/make_pans.py": "PanJob",
    "examples/quickstart/fetch_clips.py": "FetchJob",
    "examples/fsae/all_phases.py": "AllPhasesJob",
    "examples/fsae/all_phases_report.py": "ReportJob",
    "tools/account_fsae_memory.py": "AccountJob",
    "examples/layer_memory/compare.py": "CompareJob",
    "examples/layer_memory/router_rate.py": "RateJob",
    "examples/preprocess/own_latents.py": "OwnLatentsJob",
}
PRESETS_OF_TOOLS = {"tools/account_fsae_memory.py": FSAE_PRESETS}


def parser_of(script: str):
    if script in TRAINING:
        return make_parser(*TRAINING[script])
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    # The parser reads the help texts from the source of the module that a class names.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return make_parser(getattr(module, OWN_JOBS[script]), PRESETS_OF_TOOLS.get(script))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command that runs one of our scripts."""
    known = [*TRAINING, *OWN_JOBS]
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = re.sub(r"\$\{?(\w+)(:-([^}]*))?\}?", lambda match: match[3] or "1", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        for position, word in enumerate(words):
            script = word.removeprefix("./")
            if script in known and any(w in ("python", "torchrun", "srun", "exec") for w in words[:position]):
                rest = words[position + 1 :]
                stop = next((k for k, w in enumerate(rest) if w in ("|", "&&", "||", ";", "&", ">")), len(rest))
                ours = [w for w in rest[:stop] if w not in ("...", "1@", "1[@]}") and not re.match(r"\$\{?@", w)]
                found.append((script, ours))
    return found


SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)
    found = commands(path.read_text(encoding="utf-8"))
    assert found, f"{path} runs none of our scripts"
    for script, arguments in found:
        parser_of(script).parse_args(arguments)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_documented_commands_parse(path):
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
        for script, arguments in commands(block):
            parser_of(script).parse_args(arguments)


def test_a_wrong_flag_would_be_found():
    ((script, arguments),) = commands("torchrun --nproc-per-node 2 pretrain_dit.py \\\n  --no-such-flag 3\n")
    with pytest.raises(SystemExit):
        parser_of(script).parse_args(arguments)
