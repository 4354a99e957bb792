"""DC-AE weights (Chen et al. 2024, arXiv:2410.10733) as the start of an FSAE: names, layouts, what fits.

Two spellings of one network: diffusers' `AutoencoderDC`, and MIT's own (mit-han-lab/efficientvit), which is renamed to
the former first. Stages count from the pixel side in all of them. dc-ae-f32c32-sana-1.0 fits in every tensor of its six
stages. The others (f64c128) move pixels to channels by another convolution and use batch norms in their decoder: those
tensors start fresh.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.models.fsae.convolutions import VideoConv3d
from megatron_fsvideo.models.fsae.inflation import fold_interpolation, inflate, over_time
from megatron_fsvideo.models.fsae.resampling import SubPixelUp

# Beginnings of MIT's names -> those of diffusers, after ".main" and ".op_list" have been removed.
_MIT_TOP = {
    "encoder.project_in.conv.": "encoder.conv_in.",
    "encoder.project_out.0.conv.": "encoder.conv_out.",
    "encoder.stages.": "encoder.down_blocks.",
    "decoder.project_in.conv.": "decoder.conv_in.",
    "decoder.project_out.0.": "decoder.norm_out.",
    "decoder.project_out.2.conv.": "decoder.conv_out.",
    "decoder.stages.": "decoder.up_blocks.",
}
# MIT's names inside a block -> diffusers'.
_MIT_BLOCK = {
    "context_module.aggreg.0.0.": "attn.to_qkv_multiscale.0.proj_in.",
    "context_module.aggreg.0.1.": "attn.to_qkv_multiscale.0.proj_out.",
    "context_module.proj.conv.": "attn.to_out.",
    "context_module.proj.norm.": "attn.norm_out.",
    "local_module.inverted_conv.conv.": "conv_out.conv_inverted.",
    "local_module.depth_conv.conv.": "conv_out.conv_depth.",
    "local_module.point_conv.conv.": "conv_out.conv_point.",
    "local_module.point_conv.norm.": "conv_out.norm.",
    "conv1.conv.": "conv1.",
    "conv2.conv.": "conv2.",
    "conv2.norm.": "norm.",
    "conv.conv.": "conv.",
    "conv.": "conv.",
}
_MIT_QKV = "context_module.qkv.conv.weight"

# Our names inside a block -> diffusers'.
_BLOCK = {
    "conv1.": "conv1.",
    "conv2.": "conv2.",
    "norm.": "norm.",
    "attention.scale_depthwise.": "attn.to_qkv_multiscale.0.proj_in.",
    "attention.scale_pointwise.": "attn.to_qkv_multiscale.0.proj_out.",
    "attention.out.": "attn.to_out.",
    "attention_norm.": "attn.norm_out.",
    "mlp.expand.": "conv_out.conv_inverted.",
    "mlp.depthwise.": "conv_out.conv_depth.",
    "mlp.project.": "conv_out.conv_point.",
    "mlp_norm.": "conv_out.norm.",
}
_QKV = "attention.qkv.weight"


def to_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a DC-AE state dict in either spelling to diffusers' names.

    Raises:
        ValueError: the state dict has a tensor that no DC-AE has.
    """
    if not any(".op_list." in name for name in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = _renamed(name.replace(".main.", ".").replace(".op_list.", "."), _MIT_TOP, name)
        block = re.fullmatch(r"(\w+\.\w+_blocks\.\d+\.\d+\.)(.+)", short)
        if block is None:
            renamed[short] = tensor
        elif block[2] == _MIT_QKV:
            for letter, part in zip("qkv", tensor.flatten(1).chunk(3), strict=True):
                renamed[f"{block[1]}attn.to_{letter}.weight"] = part
        else:
            renamed[block[1] + _renamed(block[2], _MIT_BLOCK, name)] = tensor
    return {
        name: tensor.flatten(1) if name.endswith("attn.to_out.weight") else tensor for name, tensor in renamed.items()
    }


def dcae_config(state: Mapping[str, Tensor]) -> FSAEConfig:
    """The FSAE that has exactly the stages of a DC-AE with convolutional Downs (diffusers' names), causal over time.

    Raises:
        ValueError: the state dict is not a DC-AE, or is one without stages at full resolution.
    """
    stages = _indices(state, r"encoder\.down_blocks\.(\d+)\.")
    if not stages or stages[0] != 0:
        raise ValueError(f"not a DC-AE with blocks at full resolution: its stages are {stages}")
    return FSAEConfig(
        widths=tuple(_width(state, stage) for stage in stages),
        encoder_depths=tuple(_depth(state, "encoder.down_blocks", stage) for stage in stages),
        decoder_depths=tuple(_depth(state, "decoder.up_blocks", stage) for stage in stages),
        attention_stages=sum(f"encoder.down_blocks.{stage}.0.attn.to_q.weight" in state for stage in stages),
        latent_channels=state["encoder.conv_out.weight"].shape[0],
    )


@torch.no_grad()
def start_from_dcae(fsae: FSAE, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy what fits of a DC-AE (diffusers' names) into `fsae`, in place, as its frame-by-frame start.

    If the FSAE has more stages, these and the convolutions from and to the latents keep their initial values.

    Returns:
        (names of our tensors that keep their initial values, names of DC-AE tensors that were not used).
    """
    modules = dict(fsae.named_modules())
    fresh, used = [], set()
    for name, tensor in fsae.state_dict().items():
        value, sources = _from_dcae(fsae, state, name, modules)
        if value is None or value.shape != tensor.shape:
            fresh.append(name)
        else:
            tensor.copy_(value)
            used.update(sources)
    return fresh, sorted(set(state) - used)


def dcae_name(fsae: FSAE, state: Mapping[str, Tensor], name: str) -> str | None:
    """DC-AE's name of one of our parameters, or None if DC-AE has none. For qkv the name lacks "to_q.weight"."""
    side, part, rest = name.split(".", 2)
    encoder, decoder = fsae.encoder, fsae.decoder
    same_stages = _indices(state, rf"{side}\.\w+_blocks\.(\d+)\.")[-1:] == [len(fsae.config.widths) - 1]
    if part in ("stem", "head", "head_norm"):
        return f"{side}.{ {'stem': 'conv_in', 'head': 'conv_out', 'head_norm': 'norm_out'}[part] }.{rest}"
    if part in ("conv_in", "conv_out"):
        return f"{side}.{part}.{rest}" if same_stages else None
    if part == "downs":
        index, rest = rest.split(".", 1)
        stage = int(index) + encoder.first_stage
        return f"encoder.down_blocks.{stage}.{_depth(state, 'encoder.down_blocks', stage)}.{rest}"
    if part == "ups":
        index, rest = rest.split(".", 1)
        return f"decoder.up_blocks.{decoder.stage_numbers[int(index) + 1]}.0.{rest}"
    if part == "stages":
        index, block, rest = rest.split(".", 2)
        blocks, offset, stage = "down_blocks", 0, int(index) + encoder.first_stage
        if side == "decoder":
            blocks, stage = "up_blocks", decoder.stage_numbers[int(index)]
            offset = f"decoder.up_blocks.{stage}.0.conv.weight" in state
        prefix = f"{side}.{blocks}.{stage}.{int(block) + offset}."
        if f"{prefix}norm.running_mean" in state and rest.startswith("norm."):
            return None  # the gain of a batch norm has another meaning
        return prefix + ("attn." if rest == _QKV else _renamed(rest, _BLOCK, name))
    return None


def _from_dcae(
    fsae: FSAE, state: Mapping[str, Tensor], name: str, modules: Mapping[str, nn.Module]
) -> tuple[Tensor | None, list[str]]:
    """(our tensor, or None if it cannot be made; the names of the DC-AE tensors that it is made of)."""
    theirs = dcae_name(fsae, state, name)
    if theirs is None:
        return None, []
    if name.endswith(_QKV):
        sources = [f"{theirs}to_{letter}.weight" for letter in "qkv"]
        if sources[0] not in state:
            return None, []
        return torch.cat([state[source] for source in sources])[..., None, None], sources
    if theirs not in state:
        return None, []
    value = state[theirs]
    owner, _, kind = name.rpartition(".")
    module, parent = modules[owner], modules[owner.rpartition(".")[0]]
    if name.endswith("attention.out.weight"):
        # DC-AE has no second scale, so the weights of the other half of our inputs are zero.
        missing = value.new_zeros(len(value), max(0, module.in_channels - value.shape[1]))
        return torch.cat([value, missing], dim=1)[..., None, None], [theirs]
    if isinstance(parent, SubPixelUp):
        value = _up_channels(value, module, parent, kind)
    if isinstance(module, VideoConv3d) and kind == "weight":
        value = inflate(value, module)
    elif isinstance(module, nn.Conv3d) and kind == "weight":
        value = value.unsqueeze(2)
    return value, [theirs]


def _up_channels(value: Tensor, module: VideoConv3d, up: SubPixelUp, kind: str) -> Tensor:
    """Convert the weight or bias of an interpolating or pixel-shuffling 2D Up to our sub-pixel Up."""
    volume = up.factor[0] * up.factor[1] * up.factor[2]
    if len(value) == len(module.weight) // volume:
        value = fold_interpolation(value) if kind == "weight" else value.repeat_interleave(4)
    return over_time(value) if up.factor[0] == 2 else value


def _renamed(name: str, table: Mapping[str, str], whole: str) -> str:
    for before, after in table.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise ValueError(f"{whole} is no parameter of a DC-AE")


def _indices(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


def _width(state: Mapping[str, Tensor], stage: int) -> int:
    prefix = f"encoder.down_blocks.{stage}.0."
    name = "conv1.bias" if f"{prefix}conv1.bias" in state else "conv_out.norm.weight"
    return len(state[prefix + name])


def _depth(state: Mapping[str, Tensor], blocks: str, stage: int) -> int:
    """Number of blocks of a stage, without its Down or Up. Only a Down or Up has a plain `conv`."""
    prefix = re.escape(f"{blocks}.{stage}.")
    resampling = _indices(state, prefix + r"(\d+)\.conv\.")
    return len(_indices(state, prefix + r"(\d+)\.")) - len(resampling)
