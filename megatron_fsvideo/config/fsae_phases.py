"""The autoencoder's six training phases at the paper's sizes (paper section 2.2), as presets.

Lengths of finetunes, learning rates, the share of images and the moving average are our choices, not the paper's.
Sides are multiples of 64; "average resolution" means that shapes of about as many pixels stand for one number.
"""

from typing import Any

Preset = dict[str, Any]

_COMMON: Preset = {
    "bf16": True,
    "l1_weight": 1.0,
    "perceptual_weight": 0.1,
    "perceptual_trunk": "vgg16",
    "gan_weight": 0.1,
    "vf_weight": 0.5,
    "lr_warmup_iters": 2000,
    "weight_decay": 0.0,
    "ema_decay": 0.999,
    "use_distributed_optimizer": True,
    "image_fraction": 0.2,
    # Clips of validation follow the paper's protocol, whatever the shapes of training are.
    "num_frames": 17,
    "resolution": 256,
    "short_side": 256,
}

_SHAPES_256 = ("256x256", "192x320", "320x192")
_SHAPES_512 = ("512x512", "384x640", "640x384")
_MIXED = (
    "169x256x256",
    "169x192x320",
    "169x320x192",
    "61x512x512",
    "61x384x640",
    "61x640x384",
    "17x1024x1024",
    "17x704x1280",
    "17x1280x704",
    "9x704x704",
    "9x576x896",
    "9x896x576",
    "121x1024x1024",
    "121x704x1280",
    "121x1280x704",
    "1x1024x1024",
    "1x704x1280",
    "1x1280x704",
)


def _lengths(shapes: tuple[str, ...], *counts: int) -> tuple[str, ...]:
    return tuple(f"{count}x{shape}" for count in counts for shape in shapes)


# Three means make 121x1024x1024 fit 80 GB: four processes share the frames of a clip, the encoder's outer stages run in
# tiles, and the decoder's outer stages run on 320 x 320 pixels, of which at least 208 x 208 enter the loss.
_LARGE: Preset = _COMMON | {
    "buckets": _MIXED,
    "context_parallel_size": 4,
    "encoder_tile": 256,
    "patch_rows": 40,
    "patch_columns": 40,
    "perceptual_frames": 8,
    "recompute_granularity": "full",
    "lr": 2e-5,
}

PHASES: dict[int, Preset] = {
    1: _COMMON | {"buckets": _lengths(_SHAPES_256, 17, 1), "lr": 1e-4, "train_iters": 200_000},
    2: _COMMON
    | {
        "buckets": _lengths(_SHAPES_512, 61, 1),
        # 61x512x512 takes 123 GB on one process.
        "context_parallel_size": 2,
        "encoder_tile": 256,
        "perceptual_frames": 16,
        "recompute_granularity": "full",
        "lr": 5e-5,
        "train_iters": 200_000,
        "discriminator_warmup_iters": 1000,
    },
    3: _LARGE | {"train_iters": 200_000},
    4: _LARGE | {"train_iters": 50_000},
    5: _LARGE | {"train_iters": 100_000},
    6: _LARGE | {"train_iters": 100_000},
}


def phase_presets(causal: Preset, standard: Preset, lite: Preset) -> dict[str, Preset]:
    """`fsae_phase1` to `fsae_phase6`, from the architectures that the phases train."""
    architectures = {1: causal, 2: causal, 3: causal, 4: causal, 5: standard, 6: lite}
    return {f"fsae_phase{phase}": architectures[phase] | PHASES[phase] | {"phase": phase} for phase in PHASES}
