"""Bytes that a layer's forward pass keeps for its backward pass, derived from the modules in models/dit.

Autograd keeps what an operation's backward needs. Per line of `DiTLayer.forward`, in the model's type (e bytes, 2 in
bf16) or in fp32 (4). In bf16 every `.float()` is a copy, in fp32 it is the tensor itself:

    layer norm        its fp32 input and (before a modulation) its fp32 output
    query/key norm    the projection in fp32 (in bf16 two copies: of the square and of the product); the product in e
    rotary            nothing: its angles need no gradient
    attention         query, key, value, output, logarithms of the sums
    gated residual    the branch in fp32
    feed-forward      before and after the GELU
    layer memory      the mix, keys' and values' source, weights of the states

In bf16 no operation keeps the residual stream. Layer memory's bank and recomputation do keep it, as the same tensors.
"""

from megatron_fsvideo.planning.case import Case

FP32 = 4


def layer_bytes(case: Case, layer_number: int) -> dict[str, float]:
    """Bytes, by part, that one layer keeps of one micro-batch without full recomputation, besides its input X_{l-1}."""
    model, parallel, e = case.model, case.parallel, case.element
    width, share = model.hidden_size, model.hidden_size / case.tp
    outer, inner = case.outer_rows * width, case.inner_rows * share
    copy = FP32 if case.bf16 else 0
    has_memory = model.layer_memory and layer_number > 1
    selective = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    attention = inner * _norm_element(case) * 2 + _attention_bytes(case, "core_attn" in selective)
    ffn = case.inner_rows * model.ffn_hidden_size / case.tp
    parts = {
        "norms and modulation": outer * (copy + FP32) + outer * FP32 + outer * 2 * FP32 + 32.0 * width * _samples(case),
        "sources": _source_bytes(case, has_memory),
        "self-attention": attention,
        "cross-attention": _cross_attention_bytes(case, "core_attn" in selective),
        "feed-forward": outer * e + (0 if "mlp" in selective else 2 * e * ffn),
        "branches": outer * 2 * FP32,
    }
    if has_memory:
        mix = e if model.layer_memory_norm == "raw" else FP32
        parts["layer memory"] = outer * mix + case.outer_rows * FP32 * (layer_number + 2)
    return parts


def state_bytes(case: Case) -> float:
    """Bytes of one layer's output X_l for one micro-batch."""
    return case.outer_rows * case.model.hidden_size * case.element


def embedding_bytes(case: Case) -> float:
    """Bytes that the condition embedder and the patch embedding keep, with the contexts that all layers read."""
    model, e, samples = case.model, case.element, _samples(case)
    text = samples * case.rows.text * (model.text_embed_dim + 3 * model.hidden_size) * (model.text_embed_dim > 0)
    image = (
        samples * case.rows.image * (4 * model.image_embed_dim + 2 * model.hidden_size) * (model.image_embed_dim > 0)
    )
    patches = case.outer_rows * model.in_channels * model.patch_volume
    return float(e * (text + image + patches))


def head_bytes(case: Case) -> float:
    """Bytes that the head and the loss keep: fp32 input, normed, modulated; prediction, target and difference."""
    outputs = case.model.latent_channels * case.model.patch_volume
    return FP32 * (case.outer_rows * 3 * case.model.hidden_size + case.inner_rows * 4 * outputs)


def batch_bytes(case: Case) -> float:
    """Bytes of one micro-batch as it is read: latents, text and image features."""
    model = case.model
    latents = case.rows.tokens * model.latent_channels * model.patch_volume
    text, image = case.rows.text * model.text_embed_dim, case.rows.image * model.image_embed_dim
    return float(FP32 * _samples(case) * (latents + text + image))


def objective_bytes(case: Case) -> float:
    """Bytes that the training step makes from one micro-batch: noise, noisy latents, target, condition, input, text."""
    model = case.model
    latents = case.rows.tokens * (model.in_channels + 4 * model.latent_channels) * model.patch_volume
    return float(FP32 * _samples(case) * (latents + case.rows.text * model.text_embed_dim))


def _norm_element(case: Case) -> int:
    """Bytes that a query or key norm keeps for each element."""
    return 2 * FP32 + case.element if case.bf16 else 2 * FP32


def _samples(case: Case) -> int:
    return case.micro_batch_size


def _source_bytes(case: Case, has_memory: bool) -> float:
    """Bytes of the source of the queries, and of the source of keys and values if it is a different tensor."""
    outer = state_bytes(case)
    if case.tp == 1:
        return outer * (1 + has_memory)
    if case.parallel.sequence_parallel:  # linears keep gathered sources, the router the local one
        gathered = case.inner_rows * case.model.hidden_size * case.element
        return gathered * (1 + has_memory) + outer * has_memory
    return outer * (3 if has_memory else 1)  # both sources, joined for one collective, and the router's source


def _attention_bytes(case: Case, is_recomputed: bool) -> float:
    """Bytes of query, key, value, output, logarithms of the sums; tensors that the all-to-all moves exist twice."""
    inner = case.inner_rows * case.model.hidden_size / case.tp * case.element
    logarithms = FP32 * case.inner_rows * case.model.num_attention_heads / case.tp
    if is_recomputed:
        return inner * 4
    return inner * (4 + (case.cp > 1)) + logarithms


def _cross_attention_bytes(case: Case, is_recomputed: bool) -> float:
    """Bytes of the query, keys and values of both contexts with their norms, the output of each, and the sum."""
    model, e = case.model, case.element
    share = model.hidden_size / case.tp
    inner, context = case.inner_rows * share, case.context_rows * share
    contexts = (model.text_embed_dim > 0) + (model.image_embed_dim > 0)
    entered = case.inner_rows * model.hidden_size * e  # gathered with sequence parallelism, else the norm's output
    query = inner * (_norm_element(case) + e)
    keys_and_values = context * (_norm_element(case) + 2 * e)
    outputs = inner * e * (1 if contexts == 1 else contexts * (not is_recomputed) + 1)
    logarithms = FP32 * case.inner_rows * model.num_attention_heads / case.tp * contexts * (not is_recomputed)
    return entered + query + keys_and_values + outputs + logarithms
