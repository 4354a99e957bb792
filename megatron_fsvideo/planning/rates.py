"""The planner's assumptions about the hardware. Every figure is a flag of tools/plan_layout.py; none is measured."""

from dataclasses import dataclass

from megatron_fsvideo.config.rules import Checked, NonNegative, Positive, PositiveInt


@dataclass(frozen=True)
class RateConfig(Checked):
    """sustained rates, not peaks (defaults: 8 H100 SXM per node, 400 Gb/s per GPU between nodes, bf16)"""

    gpus_per_node: PositiveInt = 8
    """Number of GPUs with fast links among them."""
    peak_tflops: Positive = 989.0
    """Peak rate of one GPU in TFLOP/s, for the model FLOPs utilisation (MFU)."""
    gemm_tflops: Positive = 650.0
    """Rate of matrix products in TFLOP/s; about 1200 with FP8."""
    attention_tflops: Positive = 600.0
    """Rate of attention in TFLOP/s (FlashAttention 3)."""
    memory_gbs: Positive = 2700.0
    """Memory bandwidth of element-wise operations and layer memory in GB/s."""
    elementwise_passes: NonNegative = 38.0
    """Number of hidden-size tensors that a layer reads and writes in its forward pass, with fused norms, rotary
    embedding and residuals."""
    node_gbs: Positive = 350.0
    """Bandwidth from one GPU to others of its node in GB/s."""
    network_gbs: Positive = 45.0
    """Bandwidth from one GPU to other nodes in GB/s."""
    message_microseconds: NonNegative = 15.0
    """Latency of a message in microseconds."""

    def message_seconds(self, num_bytes: float, messages: float, span: int) -> float:
        """Time of messages in groups whose ranks lie within `span` consecutive ranks."""
        rate = self.node_gbs if span <= self.gpus_per_node else self.network_gbs
        return num_bytes / (rate * 1e9) + messages * self.message_microseconds * 1e-6
