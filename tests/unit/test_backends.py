"""What `--transformer-impl` and FP8 refuse and when; which attention kernel runs where, and that it is attention."""

import sys
import types

import pytest
import torch

import pretrain_dit
from megatron_fsvideo.config import (
    DIT_PRESETS,
    DiTConfig,
    DiTJob,
    DiTParallelConfig,
    check_layout,
    check_token_count,
    from_dict,
    parse_job,
    to_dict,
)
from megatron_fsvideo.models import dot_product_attention as attention
from megatron_fsvideo.models.dit import transformer_config
from megatron_fsvideo.parallel import groups

TE = ["--transformer-impl", "transformer_engine"]
FP8 = [*TE, "--bf16", "--fp8-format", "hybrid"]
WIDTHS = ["--hidden-size", "64", "--ffn-hidden-size", "128"]


def parse(*argv: str) -> DiTJob:
    return parse_job(DiTJob, DIT_PRESETS, ["--preset", "dit_debug", "--data-path", "nowhere", *WIDTHS, *argv])


def start(monkeypatch, *argv: str) -> None:
    """pretrain_dit.py, as far as it comes."""
    arguments = ["--preset", "dit_debug", "--data-path", "nowhere", *WIDTHS, *argv]
    monkeypatch.setattr(sys, "argv", ["pretrain_dit.py", *arguments])
    pretrain_dit.main()


@pytest.fixture
def device(monkeypatch):
    """Pretend a CUDA device of this compute capability, under this CUDA, with Transformer Engine installed."""

    def pretend(capability, cuda="12.9", has_te=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name in ("transformer_engine", "transformer_engine.pytorch"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if has_te else None)

    return pretend


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bf16", "--fp8-format", "e4m3"], "fp8_format e4m3 needs transformer_impl transformer_engine, not local"),
        ([*TE, "--fp8-format", "hybrid"], "fp8_format hybrid needs bf16"),
        (["--cp-comm-type", "p2p"], "cp_comm_type p2p needs transformer_impl transformer_engine"),
        ([*TE, "--cp-comm-type", "a2a+p2p"], "a2a+p2p needs two sizes"),
        ([*TE, "--hierarchical-context-parallel-sizes", "2", "2"], "a2a+p2p needs two sizes, the others none"),
        (
            [*TE, "--cp-comm-type", "a2a+p2p", "--hierarchical-context-parallel-sizes", "2", "3"],
            "2 3 must be two sizes whose product is context_parallel_size 1",
        ),
        ([*FP8, "--hidden-size", "72"], "needs a multiple of 16; hidden_size is 72"),
        ([*FP8, "--fp8-recipe", "mxfp8", "--ffn-hidden-size", "48"], "needs a multiple of 32; ffn_hidden_size"),
        ([*FP8, "--fp8-amax-history-len", "0"], "fp8_amax_history_len must be an integer of at least 1, got 0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_in_one_line(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]


def test_transformer_engine_without_a_device_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(groups, "initialize", lambda parallel: pytest.fail("too late"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device, and there is none"):
        start(monkeypatch, *FP8)


def test_missing_transformer_engine_says_what_to_install(monkeypatch, device):
    device((9, 0), has_te=False)
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation 'megatron_fsvideo\[gpu\]'"):
        start(monkeypatch, *TE)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "words"),
    [
        ("tensorwise", (8, 0), "12.9", "tensorwise needs compute capability 8.9, and this device has 8.0; leave"),
        ("delayed", (8, 6), "12.9", "delayed needs compute capability 8.9"),
        ("blockwise", (8, 9), "12.9", "blockwise needs compute capability 9.0.*it can do tensorwise, delayed"),
        ("blockwise", (9, 0), "12.8", "blockwise needs CUDA 12.9, and torch was built for 12.8"),
        ("mxfp8", (9, 0), "13.0", "mxfp8 needs compute capability 10.0.*tensorwise, delayed, blockwise"),
    ],
)
def test_a_device_that_is_too_old_for_the_recipe_is_named(monkeypatch, device, recipe, capability, cuda, words):
    device(capability, cuda)
    with pytest.raises(ValueError, match=words):
        start(monkeypatch, *FP8, "--fp8-recipe", recipe)


@pytest.mark.parametrize(
    ("recipe", "capability"), [("tensorwise", (8, 9)), ("delayed", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))]
)
def test_a_device_that_can_is_let_through(monkeypatch, device, recipe, capability):
    class Built(Exception):
        pass

    def build(parallel):
        raise Built

    device(capability)
    monkeypatch.setattr(groups, "initialize", build)
    with pytest.raises(Built):
        start(monkeypatch, *FP8, "--fp8-recipe", recipe)


def test_flags_arrive_in_megatrons_configuration_and_in_the_stored_job():
    argv = "--fp8-recipe delayed --fp8-margin 1 --fp8-amax-history-len 16 --fp8-amax-compute-algo max".split()
    more = "--context-parallel-size 4 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2".split()
    job = parse(*FP8, *argv, *more)
    assert from_dict(DiTJob, to_dict(job)) == job
    config = transformer_config(job.model, job.parallel, torch.bfloat16)
    assert (config.fp8, config.fp8_recipe, config.fp8_margin) == ("hybrid", "delayed", 1)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (16, "max")
    assert (config.cp_comm_type, config.hierarchical_context_parallel_sizes) == ("a2a+p2p", [2, 2])
    assert config.transformer_impl == "transformer_engine" and config.bf16
    local = transformer_config(job.model, DiTParallelConfig(), torch.float32)
    assert (local.fp8, local.cp_comm_type, local.transformer_impl) == (None, "a2a", "local")


@pytest.mark.parametrize(
    ("settings", "multiple"),
    [
        ({}, 1),
        ({"fp8_format": "hybrid"}, 16),
        ({"fp8_format": "e4m3", "fp8_recipe": "mxfp8"}, 32),
        ({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, 16),
        (
            {
                "fp8_format": "e4m3",
                "fp8_recipe": "blockwise",
                "sequence_parallel": True,
                "tensor_model_parallel_size": 2,
            },
            128,
        ),
    ],
)
def test_tokens_are_padded_to_what_the_recipe_wants(settings, multiple):
    assert DiTParallelConfig(transformer_impl="transformer_engine", **settings).token_multiple == multiple


def test_only_the_all_to_all_needs_heads_for_every_rank():
    model = DiTConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96)
    for comm_type in ("p2p", "all_gather"):
        settings = {"transformer_impl": "transformer_engine", "cp_comm_type": comm_type}
        check_layout(model, DiTParallelConfig(context_parallel_size=8, **settings))
    with pytest.raises(ValueError, match="8 does not divide num_attention_heads 4"):
        check_layout(model, DiTParallelConfig(context_parallel_size=8))
    uneven = DiTParallelConfig(
        transformer_impl="transformer_engine",
        context_parallel_size=16,
        cp_comm_type="a2a+p2p",
        hierarchical_context_parallel_sizes=(8, 2),
    )
    with pytest.raises(ValueError, match="hierarchical_context_parallel_sizes' first, 8 = 8 does not divide"):
        check_layout(model, uneven)


def test_transformer_engine_wants_an_even_number_of_tokens_on_each_context_parallel_rank():
    check_token_count(1860, "clips", DiTParallelConfig(context_parallel_size=4))
    with pytest.raises(ValueError, match="even number of tokens on each of context_parallel_size 4 ranks.*1860"):
        check_token_count(
            1860, "clips", DiTParallelConfig(transformer_impl="transformer_engine", context_parallel_size=4)
        )


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "kernel"),
    [
        ((9, 0), {"flash_attn_interface", "flash_attn"}, torch.bfloat16, 128, "flash3"),
        ((9, 0), {"flash_attn"}, torch.bfloat16, 128, "flash2"),
        ((9, 0), set(), torch.bfloat16, 128, "sdpa"),
        ((8, 0), {"flash_attn_interface", "flash_attn"}, torch.float16, 64, "flash2"),
        ((10, 0), {"flash_attn_interface"}, torch.bfloat16, 128, "sdpa"),  # FlashAttention 3 is Hopper's
        ((7, 5), {"flash_attn"}, torch.float16, 64, "sdpa"),
        ((9, 0), {"flash_attn_interface", "flash_attn"}, torch.float32, 128, "sdpa"),
        ((9, 0), {"flash_attn_interface", "flash_attn"}, torch.bfloat16, 12, "sdpa"),
        ((9, 0), {"flash_attn_interface", "flash_attn"}, torch.bfloat16, 264, "sdpa"),
    ],
)
def test_the_fastest_kernel_that_takes_the_tensors_is_chosen(
    monkeypatch, capability, installed, dtype, head_dim, kernel
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention, "_is_installed", lambda module: module in installed)
    assert attention.choose_kernel(torch.device("cuda", 0), dtype, head_dim) == kernel
    assert attention.choose_kernel(torch.device("cpu"), dtype, head_dim) == "sdpa"


@pytest.mark.parametrize("returns_more", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "flash2", "flash3"])
def test_every_kernel_is_called_so_that_it_computes_attention(monkeypatch, kernel, returns_more):
    """FlashAttention takes and returns [b, s, n, d]; some releases return the softmax's normaliser too."""
    query = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    key, value = torch.randn(2, 7, 2, 3, 8, dtype=torch.float64)

    def flash(query, key, value):
        scores = torch.einsum("bsnd,blnd->bnsl", query, key) / 8**0.5
        attended = torch.einsum("bnsl,blnd->bsnd", scores.softmax(-1), value)
        return (attended, scores.logsumexp(-1)) if returns_more else attended

    monkeypatch.setattr(attention, "choose_kernel", lambda *args: kernel)
    monkeypatch.setattr(attention, "_flash_function", lambda name: flash)
    scores = torch.einsum("sbnd,lbnd->bnsl", query, key) / 8**0.5
    expected = torch.einsum("bnsl,lbnd->sbnd", scores.softmax(-1), value)
    torch.testing.assert_close(attention.dot_product_attention(query, key, value), expected)
