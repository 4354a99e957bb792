"""Named starting points: field name -> value, for `--preset NAME`. A flag on the command line overrides a preset."""

from typing import Any

from megatron_fsvideo.config.dit_stages import stage_presets
from megatron_fsvideo.config.fsae_phases import phase_presets

Preset = dict[str, Any]

_QUICKSTART_DIT: Preset = {
    "num_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "ffn_hidden_size": 768,
    "latent_channels": 32,
    "text_embed_dim": 384,
    "image_embed_dim": 0,
    "freq_dim": 256,
    "q_norm_init": 2.0,
    "rotary_base": 100.0,
    "sigma_mean": 1.4,
    "prediction_type": "sample",
    "repeat_condition": True,
    "text_dropout": 0.0,
    "micro_batch_size": 8,
    "global_batch_size": 8,
    # About four minutes on two processes of one core each.
    "train_iters": 360,
    "bf16": True,
    "optimizer": "muon",
    "muon_lr": 0.02,
    "lr": 2e-3,
    "lr_warmup_iters": 50,
    "lr_decay_style": "cosine",
    "lr_decay_start": 0.5,
    "ema_decay": 0.99,
}

DIT_PRESETS: dict[str, Preset] = {
    # The paper's base DiT: Wan2.1-I2V-14B's structure with layer memory on 64x64x4, 128-channel latents.
    "dit_14b": {"bf16": True},
    # About 1.3B parameters (Wan2.1-1.3B's sizes), for one GPU.
    "dit_1b": {
        "num_layers": 30,
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "ffn_hidden_size": 8960,
        "bf16": True,
    },
    "dit_quickstart": _QUICKSTART_DIT,
    # Seconds on a CPU.
    "dit_debug": {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "latent_channels": 4,
        "text_embed_dim": 12,
        "image_embed_dim": 10,
        "freq_dim": 32,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "train_iters": 10,
        "log_interval": 1,
        "ema_decay": 0.9,
    },
}

_FSAE: Preset = {
    "bf16": True,
    "lr_warmup_iters": 2000,
    "weight_decay": 0.0,
    "ema_decay": 0.999,
    "perceptual_trunk": "vgg16",
}

# A sixteenth of the paper's weights, at its compression: for one GPU.
_FSAE_SMALL: Preset = {"widths": (32, 64, 128, 128, 256, 256, 512)}

# The paper's structure (two residual and two attention stages) in seconds on a CPU.
_FSAE_STAGES_DEBUG: Preset = {
    "widths": (8, 8, 16, 16),
    "encoder_depths": (1, 1, 1, 1),
    "decoder_depths": (1, 1, 1, 1),
    "attention_stages": 1,
    "latent_channels": 4,
    "attention_head_dim": 8,
    "first_frame_head_dim": 8,
    "num_frames": 5,
    "resolution": 32,
    "short_side": 32,
    "train_iters": 10,
    "log_interval": 1,
    "perceptual_weight": 0.0,
    "ema_decay": 0.0,
}

# Only the decoder is trained; the weights come from the phase before (--init-from).
_STANDARD: Preset = {"decoder": "standard", "phase": 5, "lr": 2e-5, "train_iters": 100_000}
_LITE: Preset = {"decoder": "lite", "phase": 6, "lr": 2e-5, "train_iters": 100_000}

FSAE_PRESETS: dict[str, Preset] = {
    # The paper's 64x64x4 autoencoder before its Standard and Lite decoders are split off (training phases 1 to 4).
    "fsae_causal": _FSAE | {"image_fraction": 0.2},
    # FSAE-Standard and FSAE-Lite (paper section 2.2.3).
    "fsae_standard": _FSAE | _STANDARD,
    "fsae_lite": _FSAE | _LITE | {"decoder_widths": (64, 128, 512, 512, 1024, 1024, 2048)},
    "fsae_causal_small": _FSAE | _FSAE_SMALL | {"image_fraction": 0.2},
    "fsae_standard_small": _FSAE | _FSAE_SMALL | _STANDARD,
    "fsae_lite_small": _FSAE | _FSAE_SMALL | _LITE | {"decoder_widths": (16, 32, 128, 128, 256, 256, 512)},
    "fsae_causal_debug": _FSAE_STAGES_DEBUG,
    "fsae_standard_debug": _STANDARD | _FSAE_STAGES_DEBUG,
    "fsae_lite_debug": _LITE | _FSAE_STAGES_DEBUG | {"decoder_widths": (4, 8, 16, 16)},
    # 8x8x4, 32 channels: convincing after minutes on two CPU cores.
    "fsae_quickstart": {
        "widths": (32, 64, 64, 128),
        "encoder_depths": (0, 1, 1, 1),
        "decoder_depths": (0, 1, 1, 1),
        "attention_stages": 1,
        "latent_channels": 32,
        "residual_init": 0.1,
        "resample_init": 0.3,
        "patchify_init": True,
        "bf16": True,
        "optimizer": "muon",
        "muon_lr": 0.02,
        "lr": 2e-3,
        "lr_warmup_iters": 20,
        "lr_decay_style": "cosine",
        "lr_decay_start": 0.4,
        "weight_decay": 0.0,
        "ema_decay": 0.0,
        "num_frames": 17,
        "resolution": 64,
        "valid_resolution": 128,
        "short_side": 144,
        "holdout_every": 5,
        "perceptual_weight": 0.0,
        "gradient_weight": 1.0,
        "latent_penalty": 0.01,
        "latent_noise": 0.1,
        "multiscale_weight": 1.0,
        "ssim_weight": 0.5,
        "image_warmup_iters": 300,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "train_iters": 660,
    },
    # Seconds on a CPU.
    "fsae_debug": {
        "widths": (8, 16, 16),
        "encoder_depths": (1, 1, 1),
        "decoder_depths": (1, 1, 1),
        "attention_stages": 1,
        "latent_channels": 4,
        "attention_head_dim": 8,
        "num_frames": 5,
        "resolution": 32,
        "short_side": 32,
        "train_iters": 10,
        "log_interval": 1,
        "perceptual_weight": 0.0,
        "ema_decay": 0.0,
    },
}

for _name in ("dit_14b", "dit_1b"):
    DIT_PRESETS |= stage_presets(_name, DIT_PRESETS[_name])
DIT_PRESETS |= stage_presets("dit_quickstart", _QUICKSTART_DIT, small=True)

# The six training phases at the paper's sizes: fsae_phase1 to fsae_phase6.
FSAE_PRESETS |= phase_presets(*(FSAE_PRESETS[name] for name in ("fsae_causal", "fsae_standard", "fsae_lite")))
