"""The stack of DiT layers of one pipeline stage, which recomputation cuts, and the bank that layer memory reads."""

from collections.abc import Iterator

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

    def _run_layers(self, hidden_states: Tensor, conditioning: Conditioning, rotary: Rotary) -> Tensor:
        bank = self._new_bank(hidden_states.device) if self.model_config.layer_memory else None
        if bank is not None and self.pre_process:
            hidden_states = bank.remember(hidden_states)
        elif bank is not None:
            hidden_states = bank.receive(hidden_states, self.layers[0].layer_number)
        for layers, is_recomputed in self._segments():
            arguments = (layers, hidden_states, bank, conditioning, rotary)
            hidden_states = recomputed(self.config, _in_turn, *arguments) if is_recomputed else _in_turn(*arguments)
            if bank is not None and layers[-1] is not self.layers[-1]:
                hidden_states = bank.remember(hidden_states)
        return hidden_states if bank is None or self.post_process else bank.send(hidden_states)

    def _segments(self) -> Iterator[tuple[list[DiTLayer], bool]]:
        """The layers in turn, and whether their activations are recomputed: all layers', or a stage's first (`block`).

        A segment is one layer. Without layer memory, uniform recomputation may take several, of which only the first's
        input is kept. The bank keeps every layer's input: with it that would save nothing.
        """
        config, layers, size = self.config, list(self.layers), 1
        is_full = config.recompute_granularity == "full" and torch.is_grad_enabled()
        if is_full and config.recompute_method == "uniform" and not self.model_config.layer_memory:
            size = config.recompute_num_layers
        for first in range(0, len(layers), size):
            is_chosen = config.recompute_method == "uniform" or first < (config.recompute_num_layers or 0)
            yield layers[first : first + size], is_full and is_chosen

    def _new_bank(self, device: torch.device) -> MemoryBank:
        config = self.model_config
        settings = MixSettings(config.layer_memory_norm == "normalized", config.layernorm_epsilon)
        return MemoryBank(mixer_for(self.layer_memory_kernel, device), settings)


def _in_turn(
    layers: list[DiTLayer], hidden_states: Tensor, bank: MemoryBank | None, conditioning: Conditioning, rotary: Rotary
) -> Tensor:
    for layer in layers:
        hidden_states = layer(hidden_states, bank, conditioning, rotary)
    return hidden_states
