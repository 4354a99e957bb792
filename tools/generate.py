"""Generate video from an image and a prompt with a checkpoint of pretrain_dit.py.

    python tools/generate.py --load checkpoints/dit --image photo.png --prompt "pan left" \
        --out out.mp4

    torchrun --nproc-per-node 2 tools/generate.py --load checkpoints/dit --tensor-model-parallel-size 2 ...

The architecture, the autoencoder and the encoders come from the checkpoint. Beside out.mp4 it writes out.png, a contact
sheet, and out.json, everything that is needed to repeat it; existing files are replaced with --overwrite only. Many at
once: `--requests requests.jsonl` with an object with image, prompt, out and optionally seed a line; relative paths in
it are relative to its folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from megatron_fsvideo.config import DiTParallelConfig, PipelineParts, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, Positive, PositiveInt
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.outputs import write_json

if TYPE_CHECKING:
    import torch

    from megatron_fsvideo.inference.pipeline import ImageToVideoPipeline, Sampling
    from megatron_fsvideo.inference.requests import Request


@dataclass(frozen=True)
class GenerateFlags(Checked):
    """what to generate"""

    load: PathText
    """Folder of the model: a --save folder of pretrain_dit.py, or a release."""
    image: PathText | None = None
    """Image file with the first frame."""
    prompt: str = ""
    """Description of the video."""
    out: PathText | None = None
    """MP4 file to write."""
    requests: PathText | None = None
    """JSONL file with one request per line: image, prompt, out and optionally seed. It replaces these flags.
    Relative paths are relative to the folder of the file."""
    overwrite: bool = False
    """Replace clips of earlier runs (with their contact sheets and records)."""
    negative_prompt: str = ""
    """Description that guidance leads away from."""
    seed: Count = 0
    """Seed of the initial noise."""
    num_inference_steps: PositiveInt = 30
    """Number of Euler steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 is off. None takes 5, or 1 for a model trained without text dropout."""
    sigma_shift: Positive | None = None
    """Timestep shift of the sampler. None takes the training's."""
    bucket: PathText | None = None
    """Shape of the video, frames x height x width. None takes the checkpoint's bucket nearest to each image's shape."""
    fps: Positive | None = None
    """Frames per second of the MP4. None takes the training data's."""
    request_batch_size: PositiveInt = 4
    """Number of requests that are generated together."""


@dataclass(frozen=True)
class GenerateJob:
    """Generate video from an image and a prompt."""

    generate: GenerateFlags
    parts: PipelineParts = field(default_factory=PipelineParts)
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)


def requests_of(flags: GenerateFlags) -> list[Request]:
    """The requests of the flags or of the --requests file, checked so that their outputs can be written.

    Raises:
        ValueError: neither or both are given, a request cannot be read, or its output would overwrite another file.
    """
    from megatron_fsvideo.inference.requests import Request, check_request_files, read_requests

    single = flags.image is not None and flags.out is not None
    if single == (flags.requests is not None):
        raise ValueError("give --image, --prompt and --out, or --requests")
    if single:
        requests = [Request(flags.image, flags.prompt, flags.out, flags.seed)]
    else:
        requests = read_requests(flags.requests, flags.seed)
    check_request_files(requests, [] if single else [flags.requests], overwrite=flags.overwrite)
    return requests


def write_result(request: Request, clip: torch.Tensor, fps: float, record: dict[str, Any]) -> None:
    """Write the mp4, the contact sheet and the record, which includes the settings of all requests."""
    from megatron_fsvideo.data.contact_sheet import write_contact_sheet
    from megatron_fsvideo.data.video import write_video

    write_video(request.out, clip, fps)
    write_contact_sheet(request.sheet, [(request.prompt, clip)])
    write_json(request.record, {"request": asdict(request), "shape": list(clip.shape), **record})


def record_of(job: GenerateJob, pipeline: ImageToVideoPipeline, sampling: Sampling, fps: float) -> dict[str, Any]:
    """All settings besides the request that are needed to repeat a clip."""
    dit = pipeline.dit
    return {
        "flags": asdict(job.generate) | asdict(job.parts) | asdict(sampling) | {"fps": fps},
        "checkpoint": {
            "folder": job.generate.load,
            "iteration": dit.iteration,
            "autoencoder": dit.data["autoencoder"],
        },
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def generate(job: GenerateJob) -> None:
    """Load once, generate every request, write on rank 0."""
    from tqdm import tqdm

    from megatron_fsvideo.data.images import read_image
    from megatron_fsvideo.inference.pipeline import ImageToVideoPipeline
    from megatron_fsvideo.inference.requests import batches_of
    from megatron_fsvideo.parallel import groups

    flags = job.generate
    requests = requests_of(flags)
    images = [read_image(request.image) for request in requests]
    pgs = groups.initialize(job.parallel)
    pipeline = ImageToVideoPipeline.from_pretrained(flags.load, job.parts, job.parallel, pgs)
    sampling = pipeline.sampling(flags.num_inference_steps, flags.guidance_scale, flags.sigma_shift)
    buckets = [Bucket.parse(flags.bucket)] if flags.bucket else pipeline.buckets
    fps = flags.fps or pipeline.fps
    record = record_of(job, pipeline, sampling, fps)

    def progress(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(steps, desc="denoising", disable=not pgs.is_rank_zero or None)

    for bucket, chosen, first_frames in batches_of(requests, images, buckets, flags.request_batch_size):
        began = time.perf_counter()
        clips = pipeline(
            first_frames,
            [request.prompt for request in chosen],
            [request.seed for request in chosen],
            sampling,
            bucket=bucket,
            negative_prompt=flags.negative_prompt,
            progress=progress,
        )
        if pgs.is_rank_zero:
            seconds = (time.perf_counter() - began) / len(chosen)
            for request, clip in zip(chosen, clips, strict=True):
                write_result(request, clip, fps, record | {"seconds_per_clip": round(seconds, 3)})
                print(f"{request.out}: {list(clip.shape)}, {seconds:.1f} s", flush=True)
    groups.barrier()
    groups.shutdown()


def main() -> None:
    """Parse the command line and generate."""
    generate(parse_job(GenerateJob))


if __name__ == "__main__":
    run_script(main)
