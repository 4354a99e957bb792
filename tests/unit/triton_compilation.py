"""Compiles Triton's kernels for an H100, which takes no GPU: python -m tests.unit.triton_compilation raw|normalized

In bf16 at the 14B model's width, and checks what their speed rests on: rows are loaded in words of 16 bytes, ahead.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_fsvideo.kernels import triton_mixing

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor that one program may take
HIDDEN = 5120

STATE, FP32, ADDRESSES = "*bf16", "*fp32", "*i64"
NUMBERS = dict.fromkeys(("batch", "num_states", "tokens", "num_parts", "index", "num_reads"), "i32") | {
    "epsilon": "fp32"
}
TENSORS = dict.fromkeys(("output", "gradient", "mix_gradient", "state", "first", "second"), STATE)
TENSORS |= dict.fromkeys(("logits", "shift", "scale", "mean_out", "rstd_out", "mean_in", "rstd_in"), FP32)
TENSORS |= dict.fromkeys(("logits_gradient", "partial_sums"), FP32)
TENSORS |= dict.fromkeys(("states", "lengths", "mix_gradients"), ADDRESSES)


def compile_kernel(kernel, norms_states):
    """The PTX and the bytes of shared memory."""
    weights = ADDRESSES if kernel is triton_mixing._pull_kernel else FP32
    tensors = TENSORS | {"weights": weights, "memory": FP32 if norms_states else STATE}
    constants = {"STATES_BLOCK": 64, "HIDDEN": HIDDEN, "BLOCK": triton.next_power_of_2(HIDDEN), "NUM_GRADIENTS": 1}
    constants |= {"TOKENS": triton_mixing.TOKENS_PER_PARTIAL_SUM, "STAGES": triton_mixing.STAGES}
    constants |= {"NORMS_STATES": norms_states}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: (tensors | NUMBERS).get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in tensors if name in names},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": triton_mixing._num_warps(HIDDEN)})
    return compiled.asm["ptx"], compiled.metadata.shared


def main():
    for name in ("_mix_kernel", "_mix_backward_kernel", "_pull_kernel"):
        ptx, shared = compile_kernel(getattr(triton_mixing, name), sys.argv[1] == "normalized")
        print(name, "shared memory", shared, "loads ahead", ptx.count("cp.async.cg"))
        assert ".b16" not in "".join(line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line)
        assert "cp.async.cg" in ptx, "rows are not loaded ahead"
        # Two programs at a time, or else loading rows ahead would cost as much as it brings.
        assert 3 * HIDDEN * 2 < shared < SHARED_MEMORY // 2


if __name__ == "__main__":
    main()
