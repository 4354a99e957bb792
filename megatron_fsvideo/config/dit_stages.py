"""Presets of the base DiT's training stages (paper section 3): images, video, larger video, with steps 1 : 2 : 2; SFT.

The paper gives resolutions, frames, the ratio of the steps and 300,000 clips for SFT. Rates, shifts, batches and the
number of steps are our choices (docs/pretraining.md). An optimizer step of the two video stages has about half a
million tokens. Each stage has its own seed, so that a sample gets different noise in each stage.
"""

from typing import Any

Preset = dict[str, Any]

_STAGES: dict[str, Preset] = {
    "stage1_image256": {
        "bucket_frames": (1,),
        "bucket_resolution": 256,
        "sigma_shift": 1.0,
        "global_batch_size": 2048,
        "batch_size_multiple": 512,
        "train_iters": 100_000,
        "lr_warmup_iters": 2000,
    },
    # train_iters includes the earlier stages; stages 2 and 3 have 200,000 steps each.
    "stage2_video256": {
        "bucket_frames": (121,),
        "bucket_resolution": 256,
        "sigma_shift": 3.0,
        "global_batch_size": 1024,
        "batch_size_multiple": 256,
        "train_iters": 300_000,
        "new_stage": True,
        "seed": 1235,
    },
    "stage3_video512": {
        "bucket_frames": (121,),
        "bucket_resolution": 512,
        "sigma_shift": 5.0,
        "global_batch_size": 256,
        "batch_size_multiple": 64,
        "train_iters": 500_000,
        "new_stage": True,
        "seed": 1236,
    },
    # Four passes over 300,000 clips.
    "sft": {
        "bucket_frames": (121,),
        "bucket_resolution": 512,
        "sigma_shift": 5.0,
        "global_batch_size": 256,
        "batch_size_multiple": 64,
        "train_iters": 4700,
        "lr": 1e-5,
        "lr_warmup_iters": 200,
        "finetune": True,
        "seed": 1237,
    },
}

# The same stages in minutes on a CPU, on latents of the quickstart's autoencoder. Because they have few steps, the
# moving average is short, and the rate does not decay within a stage.
_SHORT: Preset = {"lr_decay_style": "constant", "lr_warmup_iters": 20, "lr_decay_start": 0.0}
_SMALL_STAGES: dict[str, Preset] = {
    "stage1_image48": _SHORT
    | {"bucket_frames": (1,), "bucket_resolution": 48, "sigma_mean": 0.0, "global_batch_size": 32, "train_iters": 60},
    "stage2_video48": _SHORT
    | {"bucket_frames": (9,), "bucket_resolution": 48, "train_iters": 180, "new_stage": True, "seed": 1235},
    "stage3_video80": _SHORT
    | {"bucket_frames": (9,), "bucket_resolution": 80, "train_iters": 300, "new_stage": True, "seed": 1236},
    "sft": _SHORT
    | {
        "bucket_frames": (9,),
        "bucket_resolution": 80,
        "train_iters": 40,
        "lr": 2e-4,
        "muon_lr": 2e-3,
        "finetune": True,
        "seed": 1237,
    },
}


def stage_presets(name: str, size: Preset, small: bool = False) -> dict[str, Preset]:
    """`NAME_stage1_image256`, ... and `NAME_sft` of one size of model."""
    return {f"{name}_{stage}": size | values for stage, values in (_SMALL_STAGES if small else _STAGES).items()}
