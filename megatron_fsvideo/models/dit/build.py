"""Builds the DiT from its configuration. Only this module knows Megatron's TransformerConfig."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_fsvideo.config import DiTConfig, DiTParallelConfig, check_layout
from megatron_fsvideo.models.backends import backend_for
from megatron_fsvideo.models.dit.model import DiTModel
from megatron_fsvideo.models.dit.specs import dit_layer_spec
from megatron_fsvideo.models.dit.weights import initialize_weights
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.marks import mark_sliced


def build_dit(
    model_config: DiTConfig,
    parallel: DiTParallelConfig,
    pgs: ProcessGroups,
    *,
    params_dtype: torch.dtype,
    seed: int = 1234,
    device: torch.device | None = None,
    token_multiple: int | None = None,
) -> DiTModel:
    """This rank's part of the DiT, with initial weights that depend on `seed` alone.

    Args:
        device: where the weights live; this rank's device when None. On "meta" nothing is allocated or initialised.
        token_multiple: what each rank's tokens are padded to a multiple of; what FP8 needs when None.

    Raises:
        ValueError: the layout does not fit the model, or this machine cannot run the backend.
        ImportError: the backend's library is missing.
    """
    if parallel.num_chunks > 1:
        raise ValueError(
            f"num_virtual_stages_per_pipeline_rank {parallel.num_chunks}: this job runs one model chunk per rank; "
            "leave the flag out"
        )
    (model,) = build_dit_chunks(
        model_config,
        parallel,
        pgs,
        params_dtype=params_dtype,
        seed=seed,
        device=device,
        token_multiple=token_multiple,
    )
    return model


def build_dit_chunks(
    model_config: DiTConfig,
    parallel: DiTParallelConfig,
    pgs: ProcessGroups,
    *,
    params_dtype: torch.dtype,
    seed: int = 1234,
    device: torch.device | None = None,
    token_multiple: int | None = None,
) -> list[DiTModel]:
    """This rank's model chunks, one for each virtual pipeline stage. The chunks share one configuration."""
    check_layout(model_config, parallel)
    if parallel.fp8_format is not None and params_dtype != torch.bfloat16:
        raise ValueError(f"fp8_format {parallel.fp8_format} needs weights in bfloat16, got {params_dtype}")
    device = device or pgs.device
    layer_spec = dit_layer_spec(model_config, backend_for(parallel))
    config = transformer_config(model_config, parallel, params_dtype)
    config.init_model_with_meta_device = device.type == "meta"
    chunks = []
    for vp_stage in range(parallel.num_chunks):
        with torch.device(device):
            chunk = DiTModel(
                model_config,
                config,
                layer_spec,
                pgs,
                parallel.layer_memory_kernel,
                token_multiple or parallel.token_multiple,
                pre_process=pgs.is_first_stage and vp_stage == 0,
                post_process=pgs.is_last_stage and vp_stage == parallel.num_chunks - 1,
                vp_stage=vp_stage if parallel.num_chunks > 1 else None,
            )
        _mark_sliced_weights(chunk)
        if device.type != "meta":
            initialize_weights(chunk, seed)
        chunks.append(chunk)
    return chunks


def transformer_config(
    model_config: DiTConfig, parallel: DiTParallelConfig, params_dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of the layers. What matters here is explicit: its defaults are a language model's."""
    config = TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_attention_heads,
        kv_channels=model_config.head_dim,
        ffn_hidden_size=model_config.ffn_hidden_size,
        activation_func=partial(F.gelu, approximate="tanh"),
        normalization="LayerNorm",
        layernorm_epsilon=model_config.layernorm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=True,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        hierarchical_context_parallel_sizes=list(parallel.hierarchical_context_parallel_sizes) or None,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        pipeline_dtype=params_dtype,
        # Packed states differ in length from boundary to boundary: stages tell each other the shapes.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # a check of variable_seq_lengths asks for it; there are no experts
        deallocate_pipeline_outputs=True,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method if parallel.recompute_granularity == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers if parallel.recompute_granularity == "full" else None,
        recompute_modules=list(parallel.recompute_modules),
        transformer_impl=parallel.transformer_impl,
        fp8=parallel.fp8_format,
        fp8_recipe=parallel.fp8_recipe,
        fp8_margin=parallel.fp8_margin,
        fp8_amax_history_len=parallel.fp8_amax_history_len,
        fp8_amax_compute_algo=parallel.fp8_amax_compute_algo,
        # weights.py draws the weights. Megatron's linears make theirs on the surrounding torch.device, if they think
        # that it is the CPU; Transformer Engine's make them on the CUDA device, or there.
        use_cpu_initialization=parallel.transformer_impl == "local",
        perform_initialization=False,
        hetereogenous_dist_checkpoint=True,  # routers differ in shape from layer to layer
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # Megatron's default is an old spelling that it warns of
    )
    config.has_cond_embedder = True  # Megatron then sums the gradients of the stages' embedder copies
    return config


def _mark_sliced_weights(model: DiTModel) -> None:
    """Megatron marks its linears' weights when it draws them, which it does not do here."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear):
            mark_sliced(module.weight, dim=0)
        elif isinstance(module, RowParallelLinear):
            mark_sliced(module.weight, dim=1)
