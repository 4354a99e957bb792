"""What the planner assumes of the hardware. Every figure is a flag of tools/plan_layout.py; none is measured by it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RateConfig:
    """rates that are reached, not peaks (the defaults: 8 H100 SXM a node, 400 Gb/s a GPU between nodes, bf16)"""

    gpus_per_node: int = 8
    """GPUs that share the fast links."""
    peak_tflops: float = 989.0
    """Peak of one GPU, of which MFU is a share."""
    gemm_tflops: float = 650.0
    """Matrix products; with fp8 about 1200."""
    attention_tflops: float = 600.0
    """Attention (FlashAttention 3)."""
    memory_gbs: float = 2700.0
    """Memory bandwidth in GB/s, of element-wise operations and layer memory."""
    elementwise_passes: float = 38.0
    """Hidden-size tensors that a layer reads and writes in its forward (well fused: norms, rotary, residuals)."""
    node_gbs: float = 350.0
    """GB/s out of one GPU to others of its node."""
    network_gbs: float = 45.0
    """GB/s out of one GPU to other nodes."""
    message_microseconds: float = 15.0
    """Time that every message takes besides."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0 and name not in ("elementwise_passes", "message_microseconds"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def message_seconds(self, num_bytes: float, messages: float, span: int) -> float:
        """Time of messages in groups whose ranks lie within `span` consecutive ranks."""
        rate = self.node_gbs if span <= self.gpus_per_node else self.network_gbs
        return num_bytes / (rate * 1e9) + messages * self.message_microseconds * 1e-6
