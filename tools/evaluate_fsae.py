"""Judge autoencoders by their reconstructions, as Table 2 of the paper does (docs/evaluation.md).

    python tools/evaluate_fsae.py --load runs/fsae --video-dir videos --out runs/fsae-evaluation/evaluation.json

    torchrun --nproc-per-node 8 tools/evaluate_fsae.py --load runs/fsae_phase5 --video-dir inter4k --sampling videos \
        --num-clips 1000 --lpips-path vgg16_lpips.safetensors --i3d-path i3d.safetensors \
        --compare wan:wan2.1/vae ltx:ltx/vae hunyuan:hunyuan/vae --out table2.json

Prints a table; writes it as JSON with the measures of each clip, beside it the latents' mean and standard deviation per
channel, and a PNG of originals and reconstructions. Shots that training held out are judged where there are any; for
videos that were not trained on, `--holdout-every 0` judges every shot. Any number of processes, one result.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_fsvideo.config import VideoDataConfig, from_dict, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, PositiveInt
from megatron_fsvideo.data.outputs import check_outputs, write_json
from megatron_fsvideo.data.text_files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_fsvideo.data.shots import Shot
    from megatron_fsvideo.evaluation.autoencoders import Autoencoder
    from megatron_fsvideo.evaluation.clips import ClipList
    from megatron_fsvideo.evaluation.reconstruction import Judges, Reconstructed
    from megatron_fsvideo.evaluation.report import Row


@dataclass(frozen=True)
class EvaluateFlags(Checked):
    """what to judge and where to write"""

    load: PathText
    """Autoencoder to evaluate: a release folder, or a --save folder of pretrain_fsae.py."""
    video_dir: PathText
    """Folder of video files."""
    out: PathText
    """JSON file to write. A PNG with the same name shows originals and reconstructions."""
    compare: tuple[PathText, ...] = ()
    """Other autoencoders to evaluate on the same clips. wan:FOLDER, ltx:FOLDER and hunyuan:FOLDER are VAEs of diffusers
    in local folders; fsae:FOLDER is an FSAE."""
    num_frames: PositiveInt | None = None
    """Frames per clip. None takes the training's."""
    resolution: PositiveInt | None = None
    """Side of the centre crops in pixels. None takes the validation size of the training."""
    short_side: PositiveInt | None = None
    """Short side in pixels to which videos are resized. None takes the training's."""
    holdout_every: Count | None = None
    """Evaluate every n-th shot of each video; 0 takes all shots. None takes the training's number, so that the shots
    are unseen."""
    overwrite: bool = False
    """Replace the files of an earlier run."""
    sampling: Literal["shots", "videos"] = "shots"
    """shots: clips lie within shots. videos: each video is one clip from its beginning, and none is held out (Table
    2)."""
    num_clips: PositiveInt = 8
    """Number of clips, spread evenly over the shots or videos. If there are fewer shots than clips, each gives equally
    many, rounded up."""
    num_shown: Count = 3
    """Number of clips in the PNG."""
    shot_index: PathText | None = None
    """Folder of the index that tools/index_shots.py made of the videos. None takes .shots in --video-dir, if it is
    there."""


@dataclass(frozen=True)
class MeasureFlags(Checked):
    """how to decode and to measure"""

    noise: Literal["both", "on", "off"] = "both"
    """Noise of Standard and Lite decoders: evaluate with it, without it, or both."""
    first_frame: bool = True
    """Give a Standard or Lite decoder the first frame's features, as image-to-video generation does."""
    noise_seed: Count = 0
    """Seed of the decoders' noise."""
    lpips_path: PathText | None = None
    """File with the weights of VGG16 and the lin weights of LPIPS. None measures no LPIPS."""
    lpips_linear_path: PathText | None = None
    """File with the lin weights of LPIPS, if lpips_path holds only VGG16."""
    i3d_path: PathText | None = None
    """File with the Kinetics-400 weights of I3D. None measures no FVD."""
    device: PathText | None = None
    """Device, such as cpu or cuda. None takes the GPU of this process, if there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the autoencoders. Metrics are computed in fp32."""


@dataclass(frozen=True)
class EvaluateJob:
    """Judge autoencoders by their reconstructions."""

    evaluate: EvaluateFlags
    measure: MeasureFlags = field(default_factory=MeasureFlags)


def evaluate(job: EvaluateJob) -> None:
    """Reconstruct the clips, measure, and write the report."""
    from megatron_fsvideo.data.contact_sheet import write_contact_sheet
    from megatron_fsvideo.evaluation.autoencoders import check_names
    from megatron_fsvideo.evaluation.clips import list_clips
    from megatron_fsvideo.evaluation.reconstruction import reconstruct_clips
    from megatron_fsvideo.evaluation.report import format_table, notes
    from megatron_fsvideo.parallel.dtypes import DTYPES
    from megatron_fsvideo.parallel.team import join_team, leave_team

    flags, team = job.evaluate, join_team()
    device = team.device(job.measure.device)
    # All refusals that need no video come before the videos are read.
    check_outputs(output_files(flags), overwrite=flags.overwrite)
    data = clip_choice(flags)
    judges = load_judges(job.measure, data, device)
    autoencoders = load_autoencoders(flags, job.measure, device)
    names = check_names(autoencoders)
    for autoencoder in autoencoders:
        autoencoder.facts.check_clip(data.num_frames, data.resolution)
    listed = list_clips(data, flags.sampling, flags.num_clips, team)
    shown = spread(len(listed.clips), flags.num_shown)
    place = (device, DTYPES[job.measure.dtype])
    found = [reconstruct_clips(a, listed.clips, data, judges, team, place, shown, listed.index) for a in autoencoders]
    if team.leads:
        clips, skipped = readable_clips(listed, found)
        results = [[part[k] for k in clips] for part in found]
        rows = table_rows(names, autoencoders, results)
        report = {
            "autoencoder": autoencoders[0].facts.source,
            "fingerprint": autoencoders[0].facts.fingerprint,
            **rounded(rows[0].values),
            "clips": about_clips(flags, data, [listed.clips[k] for k in clips], skipped),
            "measured_with": asdict(job.measure),
            "table": [asdict(row) | {"values": rounded(row.values)} for row in rows],
            "notes": notes(judges, len(clips), len(skipped)),
        }
        out, latents, sheet = output_files(flags)
        write_json(out, report)
        write_json(latents, [statistics_entry(a, part) for a, part in zip(autoencoders, results, strict=True)])
        write_contact_sheet(sheet, sheet_rows(names, autoencoders, results))
        print(format_table(rows), *report["notes"], sep="\n")
    leave_team(team)


def main() -> None:
    """Parse the command line and evaluate."""
    evaluate(parse_job(EvaluateJob))


def output_files(flags: EvaluateFlags) -> tuple[Path, Path, Path]:
    """Paths of the report, the latents' statistics and the contact sheet."""
    out = Path(flags.out)
    stem = out if out.suffix == ".json" else out.with_name(out.name + ".json")
    return out, stem.with_suffix(".latents.json"), stem.with_suffix(".png")


def clip_choice(flags: EvaluateFlags) -> VideoDataConfig:
    """The clips to judge: those of the flags, else those that training held out, else the paper's 17x256x256."""
    from megatron_fsvideo.checkpoint.release import resolve_release
    from megatron_fsvideo.checkpoint.save_folder import JOB_FILE

    job_file = resolve_release(flags.load).parent / JOB_FILE
    trained = VideoDataConfig()
    if job_file.is_file():
        trained = from_dict(VideoDataConfig, read_json(job_file)["job"]["data"])
    given = {
        name: getattr(flags, name)
        for name in ("num_frames", "short_side", "holdout_every")
        if getattr(flags, name) is not None
    }
    resolution = flags.resolution or trained.valid_side
    # The index of other videos does not apply.
    others = {"shot_index": flags.shot_index, "valid_video_dir": None, "valid_shot_index": None}
    chosen = replace(
        trained, video_dir=flags.video_dir, resolution=resolution, valid_resolution=None, **others, **given
    )
    if flags.sampling == "videos":
        if flags.holdout_every:
            raise ValueError(f"--sampling videos holds out nothing: leave out --holdout-every {flags.holdout_every}")
        chosen = replace(chosen, holdout_every=0)
    return chosen


def load_judges(flags: MeasureFlags, data: VideoDataConfig, device: torch.device) -> Judges:
    """Load the judging networks that the flags name."""
    from megatron_fsvideo.evaluation.reconstruction import Judges
    from megatron_fsvideo.models.frozen.i3d import MIN_FRAMES, load_i3d
    from megatron_fsvideo.models.frozen.perceptual import load_perceptual_loss

    perceptual = None
    if flags.lpips_path is not None:
        perceptual = load_perceptual_loss("vgg16", flags.lpips_path, device, flags.lpips_linear_path)
    if flags.i3d_path is None:
        return Judges(perceptual)
    if data.num_frames < MIN_FRAMES:
        raise ValueError(f"FVD needs clips of at least {MIN_FRAMES} frames, not {data.num_frames}")
    return Judges(perceptual, load_i3d(flags.i3d_path, device))


def load_autoencoders(flags: EvaluateFlags, measure: MeasureFlags, device: torch.device) -> list[Autoencoder]:
    """Load the autoencoder of --load, then those of --compare."""
    from megatron_fsvideo.checkpoint.release import load_fsae, resolve_release
    from megatron_fsvideo.evaluation.autoencoders import ForeignAutoencoder, OurAutoencoder, parse_comparison
    from megatron_fsvideo.models.codecs.identity import fingerprint
    from megatron_fsvideo.parallel.dtypes import DTYPES

    dtype = DTYPES[measure.dtype]
    loaded: list[Autoencoder] = []
    for kind, folder in [("fsae", flags.load), *map(parse_comparison, flags.compare)]:
        if kind == "fsae":
            fsae = load_fsae(folder)
            # The fingerprint is that of the stored weights, before they are rounded.
            origin = str(resolve_release(folder)), fingerprint(fsae)
            decode = measure.noise, measure.first_frame, measure.noise_seed
            loaded.append(OurAutoencoder(fsae.to(device, dtype), *origin, *decode))
        else:
            loaded.append(ForeignAutoencoder(kind, folder, device, dtype))
    return loaded


def spread(count: int, wanted: int) -> list[int]:
    """Choose `wanted` evenly spread indices below `count`."""
    import torch

    return torch.linspace(0, count - 1, max(1, min(wanted, count))).round().int().tolist()


def readable_clips(listed: ClipList, found: list[dict[int, Reconstructed | str]]) -> tuple[list[int], dict[str, str]]:
    """Find the indices of readable clips, and name -> reason for all files and clips that could not be read.

    Raises:
        ValueError: no clip could be read.
    """
    failed = {k: reason for part in found for k, reason in part.items() if isinstance(reason, str)}
    skipped = listed.skipped | {listed.clips[k].name: reason for k, reason in failed.items()}
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr, flush=True)
    readable = [k for k in range(len(listed.clips)) if k not in failed]
    if not readable:
        raise ValueError(
            f"none of the {len(listed.clips)} clips could be read; the first: {next(iter(failed.values()))}"
        )
    return readable, skipped


def table_rows(names: list[str], autoencoders: list[Autoencoder], results: list[list[Reconstructed]]) -> list[Row]:
    """Rows of the printed table, one for each way to decode."""
    from megatron_fsvideo.evaluation.reconstruction import summarize
    from megatron_fsvideo.evaluation.report import Row

    ways = [(a.facts, part, row) for a, part in zip(autoencoders, results, strict=True) for row in a.rows]
    return [
        Row(
            name,
            facts.downsample,
            facts.compression,
            summarize(part, row),
            [rounded(result.metrics[row]) for result in part],
        )
        for name, (facts, part, row) in zip(names, ways, strict=True)
    ]


def about_clips(
    flags: EvaluateFlags, data: VideoDataConfig, clips: list[Shot], skipped: dict[str, str]
) -> dict[str, Any]:
    """Description of the judged clips."""
    return {
        "num_frames": data.num_frames,
        "resolution": data.resolution,
        "short_side": data.short_side,
        "holdout_every": data.holdout_every,
        "sampling": flags.sampling,
        "count": len(clips),
        "names": [clip.name for clip in clips],
        "skipped": skipped,
    }


def statistics_entry(autoencoder: Autoencoder, results: list[Reconstructed]) -> dict[str, Any]:
    """Mean and standard deviation per channel, named as in a latent dataset's dataset.json."""
    from megatron_fsvideo.evaluation.reconstruction import latent_statistics

    facts, sums = autoencoder.facts, latent_statistics(results)
    mean, std = sums.mean_std()
    return {
        "autoencoder": facts.source,
        "fingerprint": facts.fingerprint,
        "positions": sums.count,
        "latent_mean": mean,
        "latent_std": std,
    }


def sheet_rows(
    names: list[str], autoencoders: list[Autoencoder], results: list[list[Reconstructed]]
) -> list[tuple[str, Tensor]]:
    """Rows of the contact sheet: each shown clip, followed by its reconstructions.

    Args:
        names: names of the rows of all autoencoders, as in the table.
    """
    from megatron_fsvideo.evaluation.reconstruction import ORIGINAL

    ways = [(part, row) for a, part in zip(autoencoders, results, strict=True) for row in a.rows]
    sheet = []
    for k, first in enumerate(results[0]):
        if first.frames:
            sheet.append((f"original, clip {k}", first.frames[ORIGINAL]))
            named = zip(names, ways, strict=True)
            sheet += [(f"{name}, clip {k}", part[k].frames[row]) for name, (part, row) in named]
    return sheet


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Round a number to four decimals."""
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    run_script(main)
