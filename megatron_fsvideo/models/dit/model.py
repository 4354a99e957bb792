"""The DiT: condition embedders, patch embedding, the layers, the head (paper section 2.3; Wan2.1-I2V's structure).

**Padding.** FP8's matrix products want a multiple of 16 or 32 rows. Tokens are padded here, once for all layers: each
context-parallel rank's own behind its own, so that sequence parallelism cuts padded parts evenly. Attention cuts the
padding off (attention.py), and so does the output: nothing real depends on it, and its gradients are zero. The rest
works on tokens one by one and need not know. Text and image are padded behind their embedders.

Letters: b samples, c latent channels, n tokens of this context-parallel rank, s of them here, h hidden size.
"""

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.models.dit.block import DiTBlock
from megatron_fsvideo.models.dit.embeddings import ConditionEmbedder, Conditioning, Context
from megatron_fsvideo.models.dit.layer import modulate
from megatron_fsvideo.models.dit.rope import Rotary, rotary_tables
from megatron_fsvideo.models.dit.tokens import Grid, append_rows, local_tokens, round_up, token_grid
from megatron_fsvideo.parallel.groups import ProcessGroups
from megatron_fsvideo.parallel.marks import mark_on_every_stage, mark_sees_local_tokens
from megatron_fsvideo.parallel.sequence import gather_output_tokens, local_slice, scatter_tokens


class Head(nn.Module):
    """Modulated norm and projection to patches, in fp32. [s, b, h] -> [s, b, c * patch volume]"""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.epsilon = config.layernorm_epsilon
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.proj_out = nn.Linear(config.hidden_size, config.latent_channels * config.patch_volume)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + timestep[:, None]).unbind(dim=1)
        normed = F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=self.epsilon)
        return self.proj_out(modulate(normed, shift, scale))


class DiTModel(MegatronModule):
    """The part of the DiT that lives on one pipeline stage; all of it without pipeline parallelism.

    Args:
        layer_memory_kernel: which kernels mix the states (`kernels.mixer_for`).
        token_multiple: each rank's tokens are padded to a multiple of this.
        pre_process: embed the input here (first stage).
        post_process: put out the prediction here (last stage).
        vp_stage: which of this rank's model chunks it is, with virtual pipeline stages.
    """

    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        model_config: DiTConfig,
        config: TransformerConfig,
        layer_spec: ModuleSpec,
        pgs: ProcessGroups,
        layer_memory_kernel: str,
        token_multiple: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        self.vp_stage = vp_stage
        self.model_config = model_config
        self.pgs = pgs
        self.pre_process = pre_process
        self.post_process = post_process
        self.token_multiple = token_multiple
        self.condition_embedder = ConditionEmbedder(model_config, config.params_dtype, token_multiple)
        self.patch_embedding = None
        if pre_process:
            channels = model_config.in_channels * model_config.patch_volume
            self.patch_embedding = nn.Linear(channels, model_config.hidden_size, dtype=config.params_dtype)
        self.block = DiTBlock(
            config,
            layer_spec,
            model_config,
            layer_memory_kernel,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pgs.collection,
            vp_stage=vp_stage,
        )
        self.head = Head(model_config) if post_process else None
        self._mark_parameters()

    def forward(self, model_input: Tensor, timesteps: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """Predict from noisy latents.

        Args:
            model_input: [b, 2c + mask channels, frames, rows, columns], from `Condition.model_input`; every rank of the
                model passes all of it, later stages only read its shape.
            timesteps: 1000 * sigma [b], fp32.
            text: text embeddings [b, l, e]. image: image embeddings [b, l, e].

        Returns:
            on the last stage the prediction [b, n, c * patch volume], fp32, for this context-parallel rank's tokens;
            elsewhere what the next stage receives.

        Raises:
            ValueError: sizes that the patch or the parallel layout do not divide.
        """
        patch_size = self.model_config.patch_size
        grid = token_grid(tuple(model_input.shape[2:]), patch_size)
        tokens = local_tokens(model_input, patch_size, self.pgs.cp) if self.pre_process else None
        return self.forward_tokens(tokens, grid, timesteps, *self.embed_contexts(text, image))

    def forward_tokens(
        self, tokens: Tensor | None, grid: Grid, timesteps: Tensor, text: Context | None, image: Context | None
    ) -> Tensor:
        """Predict from this context-parallel rank's tokens of the model's input.

        Args:
            tokens: [b, n, (2c + mask channels) * patch volume]; None on later stages.
            grid: tokens of the whole clip along (t, h, w).
            text, image: from `embed_contexts`.

        Returns:
            what `forward` returns.
        """
        conditioning = Conditioning(*self.condition_embedder.embed_timesteps(timesteps), text, image)
        hidden_states = self._embed_tokens(tokens) if tokens is not None else None
        rotary = self._rotary(grid, timesteps.device)
        hidden_states = self.block(hidden_states, conditioning, rotary)
        if not self.post_process:
            return hidden_states
        prediction = self.head(hidden_states, conditioning.timestep)  # (s, b, c * p)
        if self.config.sequence_parallel:
            prediction = gather_output_tokens(prediction, self.pgs.tp)
        return prediction[: len(rotary[0])].transpose(0, 1)  # (b, n, c * p)

    def embed_contexts(self, text: Tensor | None, image: Tensor | None) -> tuple[Context | None, Context | None]:
        """Rows that cross-attention reads, from text [b, l, e] and image [b, n, e]; the same at every timestep.

        Raises:
            ValueError: text or image is missing where the model attends to it.
        """
        contexts = self.condition_embedder.embed_contexts(text, image)
        # Keys and values of all layers read the context: its gradient is summed over the heads' ranks once, here.
        text, image = (
            context and context._replace(rows=copy_to_tensor_model_parallel_region(context.rows, group=self.pgs.tp))
            for context in contexts
        )
        return text, image

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron's schedule hands over what the previous stage sent."""
        self.block.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weights, with the copies of the condition embedder on later stages told apart as replicas.

        Megatron's `_extra_state` entries are left out: pickles that hold nothing here.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {key: tensor for key, tensor in state.items() if not key.endswith("_extra_state")}
        for key, tensor in state.items():
            if key.startswith(f"{prefix}condition_embedder."):
                stage = self.pgs.pp_rank + self.pgs.pp_size * (self.vp_stage or 0)
                tensor.replica_id = (stage, *tensor.replica_id[1:])
        return state

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        tokens = tokens.transpose(0, 1)  # (n, b, c * p)
        num_parts = self.pgs.tp_size if self.config.sequence_parallel else 1
        tokens = append_rows(tokens, round_up(len(tokens), self.token_multiple * num_parts))
        if self.config.sequence_parallel:
            tokens = scatter_tokens(tokens, 0, self.pgs.tp)
        return self.patch_embedding(tokens.to(self.patch_embedding.weight.dtype))  # (s, b, h)

    def _rotary(self, grid: Grid, device: torch.device) -> Rotary:
        config = self.model_config
        cos, sin = rotary_tables(grid, config.head_dim, config.rotary_base, config.rope_scale_hw, device)
        return local_slice(cos, 0, self.pgs.cp), local_slice(sin, 0, self.pgs.cp)

    def _mark_parameters(self) -> None:
        embedder = self.condition_embedder
        local = [*embedder.time_embedder.parameters(), *embedder.time_proj.parameters()]
        for module in (self.patch_embedding, self.head):
            if module is not None:
                local += module.parameters()
        mark_sees_local_tokens(local, self.config.sequence_parallel)
        mark_on_every_stage(embedder.parameters(), self.pgs, is_first_copy=self.pre_process)
