"""The stack of DiT layers of one pipeline stage, and the states that layer memory keeps."""

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fsvideo.models.dit.embeddings import Conditioning
from megatron_fsvideo.models.dit.layer_memory import pack, unpack
from megatron_fsvideo.models.dit.rope import Rotary


class DiTBlock(TransformerBlock):
    """Megatron's transformer block with a forward of its own.

    With layer memory every layer sees all states before it. They are the layer inputs that recomputation keeps anyway,
    so the list costs no memory of its own then. Between stages they travel packed (layer_memory.py).
    """

    def forward(self, hidden_states: Tensor | None, conditioning: Conditioning, rotary: Rotary) -> Tensor:
        """Run this stage's layers.

        Args:
            hidden_states: X_0 [s, b, h] on the first stage; elsewhere None: `set_input_tensor` got the packed ones.

        Returns:
            the last layer's output [s, b, h] on the last stage, the packed states elsewhere.
        """
        states = [hidden_states] if self.pre_process else self._received_states()
        for layer in self.layers:
            output = self._run(layer, self._visible(states), conditioning, rotary)
            states.append(output)
        if self.post_process:
            return states[-1]
        return pack(self._visible(states))

    @property
    def _has_memory(self) -> bool:
        return self.layers[0].model_config.layer_memory

    def _visible(self, states: list[Tensor]) -> list[Tensor]:
        """What a layer reads, in a list of its own, which checkpoints keep: all states, or the last without memory."""
        return list(states) if self._has_memory else states[-1:]

    def _received_states(self) -> list[Tensor]:
        num_states = self.layers[0].layer_number if self._has_memory else 1
        return unpack(self.input_tensor, num_states)

    def _run(self, layer: torch.nn.Module, states: list[Tensor], conditioning: Conditioning, rotary: Rotary) -> Tensor:
        if self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():
            # Nothing in a layer is random, so there is no generator state to restore.
            return checkpoint(layer, states, conditioning, rotary, use_reentrant=False, preserve_rng_state=False)
        return layer(states, conditioning, rotary)
