"""What training with Transformer Engine's modules comes to, for test_transformer_engine.py, as one line of JSON.

    PYTHONPATH=tests/fakes python -m tests.parallel.transformer_engine_cases layouts|checkpoints|fp8 [FOLDER]

Run in a process of its own: megatron-core looks once, when it is imported, whether Transformer Engine is there.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformer_engine

import pretrain_dit
from megatron_fsvideo.config import DiTParallelConfig, OptimizerConfig
from megatron_fsvideo.models import backends
from megatron_fsvideo.models.dit import build_dit_chunks
from megatron_fsvideo.models.dit.parameter_rules import dit_parameter_rules
from megatron_fsvideo.optim.optimizer import build_optimizer, wrap_ddp
from megatron_fsvideo.parallel import groups
from megatron_fsvideo.parallel.cpu_backend import megatron_on_cpu
from megatron_fsvideo.parallel.schedule import run_schedule
from tests.functional.runs import debug_arguments, losses, run_to_end
from tests.latent_fixtures import write_latent_dataset
from tests.parallel import test_layouts
from tests.parallel.harness import run_workers
from tests.parallel.test_layouts import FULL, MODEL, SELECTIVE, forward_step, layout, microbatches, relative

TE = {"transformer_impl": "transformer_engine"}
FP8 = TE | {"fp8_format": "hybrid"}
LAYOUTS = [
    layout("alone", 1, **TE),
    layout("tp2", 2, tp=2, **TE),
    layout("tp2_sp", 2, tp=2, sequence_parallel=True, **TE),
    layout("pp2_recompute", 2, pp=2, **FULL, **TE),
    layout("tp2_sp_cp2_padded", 4, token_multiple=7, tp=2, cp=2, sequence_parallel=True, **TE),
    *(layout(f"cp2_{name}", 2, cp=2, cp_comm_type=name, **TE) for name in ("p2p", "all_gather")),
    layout("cp4_a2a+p2p", 4, cp=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2), **TE),
]
# FP8 wants multiples of 16; 16 samples of 3 context rows need padding, and so do tokens that two ranks share.
FP8_MODEL = dataclasses.replace(MODEL, hidden_size=64, ffn_hidden_size=96)


def layouts() -> dict[str, Any]:
    """How far each layout with Transformer Engine is from torch's modules in one process."""
    return {case.name: _differences(case) for case in LAYOUTS}


def _differences(case: test_layouts.Layout) -> dict[str, Any]:
    expected = test_layouts.reference(case.reference)
    ranks = run_workers(test_layouts.train, case.world_size, case)
    found: dict[str, Any] = {}
    for what in ("losses", "norms"):
        pairs = [pair for rank in ranks for pair in zip(rank[what], expected[what], strict=False)]
        found[what] = max(abs(a / b - 1) for a, b in pairs)
    for what in ("gradients", "weights"):
        found[what] = max(relative(rank[what][name], expected[what][name]) for rank in ranks for name in rank[what])
    found["same_names"] = {name for rank in ranks for name in rank["weights"]} == expected["weights"].keys()
    return found


def checkpoints(folder: Path) -> dict[str, Any]:
    """Losses of runs that go on with the other modules, in another layout too, and of one that never changes."""
    data = write_latent_dataset(folder / "data")
    te = ["--transformer-impl", "transformer_engine"]
    tp2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    runs = {"local": ([], []), "local_then_te": ([], [*te, *tp2]), "te_then_local": ([*te, *tp2], [])}
    found = {}
    for name, (first, second) in runs.items():
        save = folder / name
        for more in ([*first, "--exit-interval", "3"], [*second, "--train-iters", "6"]):
            argv = debug_arguments(data, save, "--train-iters", "6", "--lr", "1e-2", *more)
            run_to_end(argv, folder / f"{name}.log", world_size=2 if "2" in more else 1)
        found[name] = list(losses(save / "logs").values())
    return found


def fp8() -> dict[str, Any]:
    """FP8 in layouts, with recomputation and without kept weights, beside bf16 in one process."""
    sp2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    cases = {
        "bf16": (1, TE, False),
        "fp8": (1, FP8, False),
        "fp8_full": (1, FP8 | FULL, False),
        "fp8_selective": (1, FP8 | SELECTIVE, False),
        "fp8_weights_not_kept": (1, FP8, True),
        "fp8_delayed": (1, FP8 | {"fp8_recipe": "delayed", "fp8_format": "e4m3"}, False),
        "fp8_tp2_sp": (2, FP8 | sp2, False),
        "fp8_cp2_p2p": (2, FP8 | {"context_parallel_size": 2, "cp_comm_type": "p2p"}, False),
    }
    runs = {
        name: run_workers(_train_in_bf16, world_size, DiTParallelConfig(**settings), keep_none)[0]
        for name, (world_size, settings, keep_none) in cases.items()
    }
    return {
        name: {
            "losses": run["losses"],
            "linears": run["linears"],
            "linears_in_fp8": run["linears_in_fp8"],
            "from_bf16": _distance(run["gradients"], runs["bf16"]["gradients"]),
            "from_fp8": _distance(run["gradients"], runs["fp8"]["gradients"]),
        }
        for name, run in runs.items()
    }


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return relative(
        *(torch.cat([gradients[name].flatten().float() for name in expected]) for gradients in (found, expected))
    )


def _train_in_bf16(parallel: DiTParallelConfig, keeps_no_weights: bool) -> dict[str, Any]:
    """Two steps; the gradients are the second's, which has seen a change of the weights."""
    pgs = groups.initialize(parallel)
    chunks = build_dit_chunks(FP8_MODEL, parallel, pgs, params_dtype=torch.bfloat16)
    test_layouts.randomize(chunks, pgs)
    linears = [module for module in chunks[0].modules() if isinstance(module, transformer_engine.pytorch.Linear)]
    for linear in linears:
        linear.disable_parameter_transpose_cache = keeps_no_weights
    wrapped = wrap_ddp(chunks, chunks[0].config, parallel, pgs)
    settings = OptimizerConfig(lr=1e-2, clip_grad=0.05)
    optimizer = build_optimizer(wrapped, settings, dit_parameter_rules(chunks, settings.router_lr_mult), pgs)
    batches, found = microbatches(4, 0, "mixed"), []
    for _ in range(2):
        wrapped[0].zero_grad_buffer()
        optimizer.zero_grad()
        collected = run_schedule(functools.partial(forward_step, pgs=pgs), wrapped, batches, pgs)
        gradients = {
            name: test_layouts.whole_tensor(parameter.main_grad, parameter, pgs)
            for name, parameter in test_layouts.named_parameters(chunks)
        }
        with megatron_on_cpu():
            optimizer.step()
        found.append(torch.stack([entry["loss"] for entry in collected]).mean().item())
    in_fp8 = sum(linear.ran_in_fp8 for linear in linears)
    groups.shutdown()
    return {"losses": found, "gradients": gradients, "linears": len(linears), "linears_in_fp8": in_fp8}


def main() -> None:
    """This machine passes for one that has a CUDA device."""
    backends.check_backend = pretrain_dit.check_backend = lambda parallel: None
    torch.cuda.Stream = lambda: None
    case, *arguments = sys.argv[1:]
    cases = {"layouts": layouts, "checkpoints": checkpoints, "fp8": fp8}
    print(json.dumps(cases[case](*map(Path, arguments))))


if __name__ == "__main__":
    main()
