"""The stack of DiT layers of one pipeline stage, which recomputation cuts, and the bank that layer memory reads."""

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fsvideo.config import DiTConfig
from megatron_fsvideo.kernels import MixSettings, mixer_for
from megatron_fsvideo.models.dit.embeddings import Conditioning
from megatron_fsvideo.models.dit.layer import DiTLayer
from megatron_fsvideo.models.dit.memory_bank import MemoryBank
from megatron_fsvideo.models.dit.recompute import recomputed
from megatron_fsvideo.models.dit.rope import Rotary


class DiTBlock(TransformerBlock):
    """Megatron's transformer block with a forward of its own.

    Args:
        layer_memory_kernel: see `kernels.mixer_for`.
        vp_stage: which of a rank's model chunks this is, with virtual pipeline stages.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        model_config: DiTConfig,
        layer_memory_kernel: str,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        super().__init__(
            config,
            spec,
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.model_config = model_config
        self.layer_memory_kernel = layer_memory_kernel

    def forward(self, hidden_states: Tensor | None, conditioning: Conditioning, rotary: Rotary) -> Tensor:
        """Run this stage's layers.

        Args:
            hidden_states: X_0 [s, b, h] on the first stage; elsewhere None: `set_input_tensor` got what was sent.

        Returns:
            the last layer's output [s, b, h] on the last stage; elsewhere, with layer memory, all states packed.
        """
        source = hidden_states if self.pre_process else self.input_tensor
        # Only Transformer Engine's linears heed it: the router, norms and modulation stay in high precision.
        with get_fp8_context(self.config):
            return self._run_layers(source, conditioning, rotary)

    def _run_layers(self, source: Tensor, conditioning: Conditioning, rotary: Rotary) -> Tensor:
        if not self.model_config.layer_memory:
            return self._run_without_memory(source, conditioning, rotary)
        bank = self._new_bank(source.device)
        latest = bank.remember(source) if self.pre_process else bank.receive(source, self.layers[0].layer_number)
        for index, layer in enumerate(self.layers):
            # The bank keeps every layer's input: recomputing several layers at once would save nothing.
            output = self._run([layer], self._is_recomputed(index), latest, bank, conditioning, rotary)
            latest = output if index == len(self.layers) - 1 else bank.remember(output)
        return latest if self.post_process else bank.send(latest)

    def _run_without_memory(self, hidden_states: Tensor, conditioning: Conditioning, rotary: Rotary) -> Tensor:
        layers, number = list(self.layers), 1
        if self.config.recompute_granularity == "full" and self.config.recompute_method == "uniform":
            number = self.config.recompute_num_layers
        for first in range(0, len(layers), number):
            together = layers[first : first + number]
            hidden_states = self._run(together, self._is_recomputed(first), hidden_states, None, conditioning, rotary)
        return hidden_states

    def _new_bank(self, device: torch.device) -> MemoryBank:
        config = self.model_config
        settings = MixSettings(config.layer_memory_norm == "normalized", config.layernorm_epsilon)
        return MemoryBank(mixer_for(self.layer_memory_kernel, device), settings)

    def _is_recomputed(self, layer_index: int) -> bool:
        """Whether a layer's activations are recomputed: of all layers, or of a stage's first (`block`)."""
        config = self.config
        if config.recompute_granularity != "full" or not torch.is_grad_enabled():
            return False
        return config.recompute_method == "uniform" or layer_index < config.recompute_num_layers

    def _run(
        self,
        layers: list[DiTLayer],
        is_recomputed: bool,
        hidden_states: Tensor,
        bank: MemoryBank | None,
        conditioning: Conditioning,
        rotary: Rotary,
    ) -> Tensor:
        arguments = (layers, hidden_states, bank, conditioning, rotary)
        return recomputed(self.config, _in_turn, *arguments) if is_recomputed else _in_turn(*arguments)


def _in_turn(
    layers: list[DiTLayer], hidden_states: Tensor, bank: MemoryBank | None, conditioning: Conditioning, rotary: Rotary
) -> Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, bank, conditioning, rotary)
    return hidden_states
