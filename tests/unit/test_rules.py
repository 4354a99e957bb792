"""Rules of values from outside: one line with file, field, value and what is allowed, whatever the source."""

import json
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from megatron_fsvideo.config import (
    DIT_PRESETS,
    FSAE_PRESETS,
    Checked,
    DiTJob,
    FSAEJob,
    OptimizerConfig,
    TrainingConfig,
    build_job,
    from_dict,
    make_parser,
    parse_job,
    parse_json,
    prefixed,
    to_dict,
)
from megatron_fsvideo.config.rules import PathText, PositiveInt, Share, allowed


@dataclass(frozen=True)
class Everything(Checked):
    """one field of each kind"""

    count: PositiveInt = 1
    """A count."""
    share: Share = 0.5
    """A share."""
    flag: bool = False
    """A flag."""
    path: PathText | None = None
    """A path."""
    kind: Literal["a", "b"] = "a"
    """A kind."""
    sizes: tuple[PositiveInt, ...] = (1,)
    """Sizes."""
    pair: tuple[Annotated[float, Meta(gt=0, lt=1)], int] = (0.5, 3)
    """A pair."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"count": True}, "count must be an integer of at least 1, got True"),
        ({"count": 1.0}, "count must be an integer of at least 1, got 1.0"),
        ({"count": None}, "count must be an integer of at least 1, got None"),
        ({"count": 2**63}, "count must be an integer of at most 64 bits, got 9223372036854775808"),
        ({"share": 1.5}, "share must be a number of at least 0 and of at most 1, got 1.5"),
        ({"share": float("nan")}, "share must be a finite number, got nan"),
        ({"share": float("-inf")}, "share must be a finite number, got -inf"),
        ({"share": "0.5"}, "share must be a number of at least 0 and of at most 1, got '0.5'"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"path": ""}, "path must be text that is not empty or none, got ''"),
        ({"path": "a\0b"}, "path must be text without a null character, got 'a\\x00b'"),
        ({"path": "\ud800"}, "path must be text without half a surrogate pair, got '\\ud800'"),
        ({"path": ["x"]}, "path must be text that is not empty or none, got ['x']"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"sizes": 3}, "sizes must be a list of values, each an integer of at least 1, got 3"),
        ({"sizes": [3, 0]}, "sizes must be a list of values, each an integer of at least 1, got [3, 0]"),
        ({"pair": [0.5]}, "pair must be 2 values, first a number above 0 and below 1, then an integer, got [0.5]"),
    ],
)
def test_a_value_that_a_field_does_not_allow(values, message):
    with pytest.raises(ValueError) as direct:
        Everything(**values)
    assert str(direct.value) == message
    with pytest.raises(ValueError) as changed:
        replace(Everything(), **values)
    assert str(changed.value) == message
    with pytest.raises(ValueError) as read:
        from_dict(Everything, values, "job.json")
    assert str(read.value) == f"job.json: {message}"


def test_values_become_what_the_field_says():
    made = Everything(share=1, sizes=[2, 3], pair=[0.25, 2])
    assert made.sizes == (2, 3) and made.pair == (0.25, 2) and isinstance(made.share, float)


def test_messages_stay_short():
    for value in ("x" * 10_000, ["y"] * 10_000, {"a": {"b": {}}}, 10**100):
        with pytest.raises(ValueError) as error:
            Everything(kind=value)
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "job.json: DiTJob must be an object with fields, got []"),
        (None, "got None"),
        ({"training": []}, "job.json: training: TrainingConfig must be an object with fields, got []"),
        ({"training": {"log": 1}}, "job.json: training: TrainingConfig has no field 'log'"),
        (
            {"training": {"train_iters": "x"}},
            "job.json: training: train_iters must be an integer of at least 1, got 'x'",
        ),
        ({"model": {"hidden_size": 7}}, "job.json: model: hidden_size 7 is not a multiple of num_attention_heads 40"),
    ],
)
def test_a_record_that_is_wrong_is_one_line_with_its_file_and_group(values, words):
    with pytest.raises(ValueError) as error:
        from_dict(DiTJob, values, "job.json")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": NaN}',
        '{"a": Infinity}',
        "[1e999]",
        '"\\ud800"',
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 9999,
        "{}x",
    ],
)
def test_json_that_is_none_is_one_line_with_the_file(text):
    with pytest.raises(ValueError, match="^job.json is not valid") as error:
        parse_json(text, "job.json")
    assert len(str(error.value)) < 300


ODD_FLAGS = """
--log-interval 0|--train-iters 0|--train-iters -5|--micro-batch-size -1|--micro-batch-size 0|--global-batch-size 0
--micro-batch-size -1 --global-batch-size -2|--seed -1|--eval-interval -1|--eval-iters -1|--exit-interval -3
--exit-duration-in-mins 0|--exit-duration-in-mins nan|--max-consecutive-skipped 0|--lr nan|--lr inf|--lr -1
--muon-lr nan|--min-lr -0.1|--lr-decay-start 1|--lr-decay-start nan|--lr-warmup-iters -1|--weight-decay nan
--weight-decay -1|--adam-beta1 1|--adam-beta2 1.5|--adam-eps 0|--adam-eps nan|--clip-grad -1|--clip-grad nan
--ema-decay 1|--ema-decay nan|--save-interval -1|--keep-checkpoints -1|--profile-step-start -1|--peak-tflops 0
--peak-tflops nan|--distributed-timeout-minutes 0|--distributed-timeout-minutes nan|--context-parallel-size 0
--lr 1e400|--train-iters 1e3|--train-iters 99999999999999999999|--seed x|--recompute-granularity none
"""
ODD_DIT = """
--hidden-size 0|--num-attention-heads 0|--num-layers 0|--num-layers -1|--ffn-hidden-size 0|--latent-channels 0
--mask-channels -1|--patch-size 1 2|--patch-size 1 0 2|--text-embed-dim -1|--freq-dim 0|--layernorm-epsilon 0
--rotary-base 0|--rope-scale-hw 0|--q-norm-init nan|--sigma-mean nan|--sigma-std 0|--sigma-shift inf|--huber-c nan
--text-dropout 1.1|--image-dropout -0.1|--tensor-model-parallel-size 0|--tensor-model-parallel-size -1
--pipeline-model-parallel-size 0|--fp8-margin -1|--recompute-modules attn|--bucket-frames 0|--bucket-resolution 0
--tokens-per-batch -1|--num-workers -1|--max-bad-fraction 2|--max-bad-fraction nan|--num-sampling-steps 0
--sampling-guidance-scale nan|--router-lr-mult nan
"""
ODD_FSAE = """
--widths 8 8 0|--encoder-depths 1 -1 1|--attention-stages -1|--noise-weight nan|--first-frame-head-dim 0|--phase 7
--phase 0|--image-fraction 2|--image-fraction nan|--image-warmup-iters -1|--image-batch-size 0|--l1-weight -1
--perceptual-weight nan|--perceptual-frames -1|--latent-noise nan|--gan-weight inf|--r1-interval 0|--vf-rows 0
--encoder-tile -1|--patch-rows -8|--num-frames 0|--num-frames -3|--resolution 0|--resolution -64
--max-frame-stride 0|--holdout-every -1|--cache-gib nan|--residual-init nan|--resample-init -1|--norm-epsilon 0
--latent-channels 0|--discriminator-width 0
"""


def lines_of(text: str) -> list[str]:
    return [part for line in text.strip().splitlines() for part in line.split("|")]


@pytest.mark.parametrize("flags", lines_of(ODD_FLAGS) + lines_of(ODD_DIT))
def test_odd_flags_of_the_dit(flags, capsys):
    check_refused(DiTJob, DIT_PRESETS, ["--preset", "dit_debug", *flags.split()], capsys)


@pytest.mark.parametrize("flags", lines_of(ODD_FLAGS) + lines_of(ODD_FSAE))
def test_odd_flags_of_the_autoencoder(flags, capsys):
    check_refused(FSAEJob, FSAE_PRESETS, ["--preset", "fsae_debug", *flags.split()], capsys)


@pytest.mark.parametrize("flag", ["--save", "--load", "--tensorboard-dir", "--data-path"])
def test_an_empty_path_is_no_path(flag, capsys):
    check_refused(DiTJob, DIT_PRESETS, ["--preset", "dit_debug", flag, ""], capsys)


def check_refused(job_class: type, presets: Any, argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_job(job_class, presets, argv)
    message = capsys.readouterr().err
    name = argv[2].removeprefix("--")
    assert exit_info.value.code == 2 and message.count("\n") == 1
    assert name in message or name.replace("-", "_") in message, message


@dataclass(frozen=True)
class TwoOptimizers:
    """a job that owns two networks"""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = prefixed(OptimizerConfig, "critic", lr=4e-4, ema_decay=0.0)


def test_a_job_with_two_optimizers():
    presets = {"small": {"lr": 1e-3, "critic_min_lr": 1e-5}}
    job = parse_job(TwoOptimizers, presets, "--preset small --critic-optimizer muon --weight-decay 0.5".split())
    assert (job.optimizer.lr, job.optimizer.min_lr, job.optimizer.weight_decay) == (1e-3, 0.0, 0.5)
    assert job.critic == OptimizerConfig(optimizer="muon", lr=4e-4, min_lr=1e-5, ema_decay=0.0)
    assert from_dict(TwoOptimizers, json.loads(json.dumps(to_dict(job)))) == job
    assert build_job(TwoOptimizers, {"critic_lr": 1}).critic.lr == 1.0
    text = " ".join(make_parser(TwoOptimizers).format_help().split())
    assert "--critic-lr X Peak learning rate of AdamW. (default: 0.0004)" in text
    assert "--lr X Peak learning rate of AdamW. (default: 0.0001)" in text


def test_a_refused_value_of_a_prefixed_flag_is_named_with_its_prefix(capsys):
    with pytest.raises(SystemExit):
        parse_job(TwoOptimizers, None, ["--critic-lr", "nan"])
    assert "error: critic_lr must be a finite number, got nan" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^critic: lr must be a number of at least 0, got -1"):
        from_dict(TwoOptimizers, {"critic": {"lr": -1}})


def test_what_is_allowed_in_words():
    assert allowed(tuple[int, int, int]) == "3 values, each an integer"
    assert allowed(int | None) == "an integer or none"
