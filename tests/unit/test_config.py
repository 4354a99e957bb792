"""Configuration: a field is a flag, precedence is default < preset < flag, JSON round trips, mistakes are one line."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field

import pytest

from megatron_fsvideo.config import (
    DIT_PRESETS,
    FSAE_PRESETS,
    Checked,
    DiTConfig,
    DiTJob,
    DiTParallelConfig,
    FSAEJob,
    GroupSizes,
    ParallelConfig,
    check_layout,
    check_token_count,
    differences,
    from_dict,
    make_parser,
    parse_job,
    require,
    run_script,
    to_dict,
)

JOBS = [(DiTJob, DIT_PRESETS), (FSAEJob, FSAE_PRESETS)]
EVERY_PRESET = [(job, presets, name) for job, presets in JOBS for name in presets]


@pytest.mark.parametrize(("job_class", "presets", "name"), EVERY_PRESET)
def test_presets_build_and_round_trip_through_json(job_class, presets, name):
    job = parse_job(job_class, presets, ["--preset", name])
    assert from_dict(job_class, json.loads(json.dumps(to_dict(job)))) == job


def test_precedence_is_default_then_preset_then_flag():
    assert parse_job(DiTJob, DIT_PRESETS, []).model.num_layers == 40
    preset = parse_job(DiTJob, DIT_PRESETS, ["--preset", "dit_debug"])
    assert preset.model.num_layers == DIT_PRESETS["dit_debug"]["num_layers"] == 2
    flag = parse_job(DiTJob, DIT_PRESETS, ["--num-layers", "6", "--preset", "dit_debug"])
    assert flag.model.num_layers == 6
    assert flag.model.hidden_size == preset.model.hidden_size


def test_a_flag_that_repeats_the_default_still_beats_the_preset():
    job = parse_job(DiTJob, DIT_PRESETS, ["--preset", "dit_debug", "--num-layers", "40"])
    assert job.model.num_layers == 40


def test_flag_types():
    argv = "--patch-size 1 2 2 --data-path 0.7 a 0.3 b --no-layer-memory --sequence-parallel".split()
    job = parse_job(DiTJob, DIT_PRESETS, [*argv, "--tensor-model-parallel-size", "2"])
    assert job.model.patch_size == (1, 2, 2)
    assert job.data.data_path == ("0.7", "a", "0.3", "b")
    assert job.model.layer_memory is False
    assert job.parallel.sequence_parallel is True
    assert job.checkpoint.save is None


@pytest.mark.parametrize(("job_class", "presets"), JOBS)
def test_help_groups_flags_and_shows_meaning_and_default(job_class, presets):
    text = " ".join(make_parser(job_class, presets).format_help().split())
    for group_class in typing.get_type_hints(job_class).values():
        assert f"{group_class.__name__}: " in text
        for flag in dataclasses.fields(group_class):
            assert "--" + flag.name.replace("_", "-") in text
    assert "Optimizer steps of the whole run. (default: 100)" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tensor-model-parallel-size", "3"], ["3", "num_attention_heads 40"]),
        (["--tensor-model-parallel-size", "4", "--context-parallel-size", "4"], ["4 x", "16", "Ulysses"]),
        (["--pipeline-model-parallel-size", "3"], ["3", "num_layers 40"]),
        (["--sequence-parallel"], ["tensor_model_parallel_size"]),
        (["--num-layer", "3"], ["unrecognized", "--num-layer"]),
        (["--micro-batch-size", "3", "--global-batch-size", "4"], ["global_batch_size 4", "micro_batch_size 3"]),
        (["--hidden-size", "100", "--num-attention-heads", "3"], ["100", "3"]),
        (["--preset", "dit_15b"], ["dit_15b", "dit_14b"]),
    ],
)
def test_a_bad_command_line_is_one_line_with_the_numbers(argv, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_job(DiTJob, DIT_PRESETS, argv)
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "words"), [(["--num-frames", "16"], ["4k+1", "16"]), (["--resolution", "100"], ["100", "64"])]
)
def test_bad_video_sizes_are_named(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_job(FSAEJob, FSAE_PRESETS, argv)
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_uneven_pipeline_stages_are_legal():
    check_layout(
        DiTConfig(num_layers=41),
        DiTParallelConfig(pipeline_model_parallel_size=2, num_layers_in_last_pipeline_stage=20),
    )


@pytest.mark.parametrize(
    ("pp", "first", "last", "words"),
    [
        (2, 41, None, "take 41 of num_layers 41; the other 0 cannot be shared evenly by the other 1 of 2 stages"),
        (2, 20, 20, "take 40 of num_layers 41; the other 1 cannot be shared evenly by the other 0 of 2 stages"),
        (3, 20, None, "take 20 of num_layers 41; the other 21 cannot be shared evenly by the other 2 of 3 stages"),
        (1, 20, None, "other 21 cannot be shared evenly by the other 0 of 1 stages"),
        (3, None, None, "3 does not divide num_layers 41"),
    ],
)
def test_pipeline_stages_that_do_not_fit_are_named(pp, first, last, words):
    parallel = DiTParallelConfig(
        pipeline_model_parallel_size=pp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    with pytest.raises(ValueError, match=words):
        check_layout(DiTConfig(num_layers=41), parallel)


def test_layers_of_a_virtual_stage_are_another_spelling_of_their_number():
    def parallel(*flags):
        argv = "--num-layers 24 --pipeline-model-parallel-size 4".split()
        return parse_job(DiTJob, None, [*argv, *flags]).parallel

    by_layers = parallel("--num-layers-per-virtual-pipeline-stage", "2")
    assert by_layers == parallel("--num-virtual-stages-per-pipeline-rank", "3") and by_layers.num_chunks == 3
    assert parallel("--num-layers-per-virtual-pipeline-stage", "6") == parallel()  # one chunk


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("-layers-per-virtual-pipeline-stage 2 --num-virtual-stages-per-pipeline-rank 3", "give one of them"),
        ("-layers-per-virtual-pipeline-stage 0", "must be an integer of at least 1 or none, got 0"),
        ("-layers-per-virtual-pipeline-stage 2 --pipeline-model-parallel-size 1", "parallel_size of at least 2, got 1"),
        (
            "-layers-per-virtual-pipeline-stage 4",
            "4 x pipeline_model_parallel_size 4 = 16 does not divide num_layers 24",
        ),
        ("-layers-per-virtual-pipeline-stage 2 --num-layers-in-first-pipeline-stage 3", "for even pipeline stages"),
    ],
)
def test_virtual_stages_that_make_no_sense_are_refused(flags, words, capsys):
    argv = "--num-layers 24 --pipeline-model-parallel-size 4 --num"
    with pytest.raises(SystemExit):
        parse_job(DiTJob, None, (argv + flags).split())
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_job_that_cannot_count_virtual_stages_refuses_them():
    parallel = DiTParallelConfig(pipeline_model_parallel_size=4, num_layers_per_virtual_pipeline_stage=2)
    with pytest.raises(ValueError, match="num_layers_per_virtual_pipeline_stage 2: this job runs one model chunk"):
        check_layout(DiTConfig(), parallel)


def test_tokens_that_the_ranks_cannot_share_are_named():
    parallel = DiTParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4, sequence_parallel=True)
    with pytest.raises(ValueError, match="bucket 5x32x32: its 36 tokens .* 4 x .* 2 .* = 8 ranks"):
        check_token_count(36, "bucket 5x32x32", parallel)
    check_token_count(36, "bucket", DiTParallelConfig(tensor_model_parallel_size=8, context_parallel_size=4))


def test_what_all_jobs_share_has_one_rank_a_model_but_for_context_parallelism():
    assert ParallelConfig(context_parallel_size=2).group_sizes == GroupSizes(context=2)
    dit = DiTParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4, context_parallel_size=2)
    assert dit.group_sizes == GroupSizes(tensor=2, context=2, pipeline=4) and dit.model_parallel_size == 16


def test_an_autoencoder_refuses_cuts_of_time_beside_context_parallelism(capsys):
    for flags in ("--encoder-slice 4", "--patch-latents 4"):
        with pytest.raises(SystemExit):
            parse_job(FSAEJob, FSAE_PRESETS, f"--context-parallel-size 2 {flags}".split())
        assert "context_parallel_size 2 has cut already" in capsys.readouterr().err


def test_differences_name_the_field_and_both_values():
    assert differences(DiTConfig(), DiTConfig(num_layers=30)) == ["num_layers: checkpoint 40, this run 30"]


def test_from_dict_refuses_unknown_fields():
    with pytest.raises(ValueError, match="num_heads"):
        from_dict(DiTJob, {"model": {"num_heads": 3}})


def test_a_field_without_a_docstring_is_refused():
    @dataclass(frozen=True)
    class Group(Checked):
        """a group"""

        number: int = 0

    @dataclass(frozen=True)
    class Job:
        """a job"""

        group: Group = field(default_factory=Group)

    # Local classes: their hints resolve by class, not by name.
    Job.__annotations__["group"] = Group
    with pytest.raises(TypeError, match="number"):
        make_parser(Job)


def test_require_names_the_extra():
    with pytest.raises(ImportError, match=r"megatron_fsvideo\[eval\]"):
        require("a_library_that_is_not_there", "eval")


def test_run_script_lets_our_own_defects_keep_their_traceback():
    def main():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        run_script(main)
