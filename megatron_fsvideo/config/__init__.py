"""Configuration of jobs: dataclasses whose fields are flags, presets, and the parser. Imports nothing of ours."""

from megatron_fsvideo.config.cli import run_script
from megatron_fsvideo.config.compression import Compression
from megatron_fsvideo.config.data import DataConfig, VideoDataConfig
from megatron_fsvideo.config.dit import DiffusionConfig, DiTConfig
from megatron_fsvideo.config.flags import (
    build_job,
    differences,
    given_preset,
    make_parser,
    parse_job,
    prefixed,
    presets_for,
    spell_flags,
)
from megatron_fsvideo.config.fsae import FSAEConfig, FSAEMemoryConfig, FSAEPhaseConfig
from megatron_fsvideo.config.fsae_losses import (
    AdversaryConfig,
    AlignmentConfig,
    PerceptualLossConfig,
    ReconstructionLossConfig,
)
from megatron_fsvideo.config.generation import PipelineParts
from megatron_fsvideo.config.jobs import DiTJob, FSAEJob, check_layout, check_token_count
from megatron_fsvideo.config.latent_upsampler import LatentUpsamplerConfig, LatentUpsamplingLossConfig
from megatron_fsvideo.config.parallel import DiTParallelConfig, GroupSizes, ParallelConfig
from megatron_fsvideo.config.presets import DIT_PRESETS, FSAE_PRESETS
from megatron_fsvideo.config.require import require
from megatron_fsvideo.config.rules import Checked, from_dict, parse_json, to_dict
from megatron_fsvideo.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ProfilingConfig,
    StageConfig,
    TrainingConfig,
)

__all__ = [
    "DIT_PRESETS",
    "FSAE_PRESETS",
    "AdversaryConfig",
    "AlignmentConfig",
    "CheckpointConfig",
    "Checked",
    "Compression",
    "DataConfig",
    "DiTConfig",
    "DiTJob",
    "DiTParallelConfig",
    "DiffusionConfig",
    "FSAEConfig",
    "FSAEJob",
    "FSAEMemoryConfig",
    "FSAEPhaseConfig",
    "GroupSizes",
    "LatentUpsamplerConfig",
    "LatentUpsamplingLossConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PerceptualLossConfig",
    "PipelineParts",
    "ProfilingConfig",
    "ReconstructionLossConfig",
    "StageConfig",
    "TrainingConfig",
    "VideoDataConfig",
    "build_job",
    "check_layout",
    "check_token_count",
    "differences",
    "from_dict",
    "given_preset",
    "make_parser",
    "parse_job",
    "parse_json",
    "prefixed",
    "presets_for",
    "require",
    "run_script",
    "spell_flags",
    "to_dict",
]
