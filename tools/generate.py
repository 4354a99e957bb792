"""Generate video from an image and a prompt with a checkpoint of pretrain_dit.py.

    python tools/generate.py --load checkpoints/dit --image photo.png --prompt "pan left" \
        --out out.mp4

    torchrun --nproc-per-node 2 tools/generate.py --load checkpoints/dit --tensor-model-parallel-size 2 ...

The architecture, the autoencoder and the encoders come from the checkpoint. Beside out.mp4 it writes out.png, a contact
sheet, and out.json, everything that is needed to repeat it; existing files are replaced with --overwrite only. Many at
once: `--requests requests.jsonl` with an object with image, prompt, out and optionally seed a line; relative paths in
it are relative to its folder.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Literal

import torch
from tqdm import tqdm

from megatron_fsvideo.config import DiTParallelConfig, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, Positive, PositiveInt
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.images import read_image
from megatron_fsvideo.data.outputs import write_json
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.inference.contact_sheet import write_contact_sheet
from megatron_fsvideo.inference.loading import LoadedDiT, load_autoencoder, load_dit
from megatron_fsvideo.inference.pipeline import ImageToVideoPipeline, Sampling
from megatron_fsvideo.inference.requests import Request, check_request_files, nearest_bucket, read_requests
from megatron_fsvideo.models.encoders import confirmed_name, load_image_encoder, load_text_encoder
from megatron_fsvideo.parallel import groups

DEFAULT_GUIDANCE_SCALE = 5.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
    fsae: PathText | None = None
    """Folder of the autoencoder, if it has moved since training."""
    text_encoder: PathText | None = None
    """Text encoder, as umt5:PATH_OR_HUB_ID. Required unless it comes as a package: no file is loaded from a place that
    only the checkpoint names."""
    image_encoder: PathText | None = None
    """Image encoder, as clip:PATH_OR_HUB_ID. Required unless it comes as a package."""
    allow_download: bool = False
    """Take encoders from the Hugging Face hub if no folder has their name."""
    autoencoder_dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the autoencoder. bf16 is several times faster, on CPUs too."""
    use_ema: bool = True
    """Use the moving average of the weights."""
    request_batch_size: PositiveInt = 4
    """Number of requests that are generated together."""


@dataclass(frozen=True)
class GenerateJob:
    """Generate video from an image and a prompt."""

    generate: GenerateFlags
    parallel: DiTParallelConfig = field(default_factory=DiTParallelConfig)


def requests_of(flags: GenerateFlags) -> list[Request]:
    """The requests of the flags or of the --requests file, whose outputs can be written.

    Raises:
        ValueError: neither or both are given, a request cannot be read, or its files would destroy something.
    """
    single = flags.image is not None and flags.out is not None
    if single == (flags.requests is not None):
        raise ValueError("give --image, --prompt and --out, or --requests")
    if single:
        requests = [Request(flags.image, flags.prompt, flags.out, flags.seed)]
    else:
        requests = read_requests(flags.requests, flags.seed)
    check_request_files(requests, [] if single else [flags.requests], overwrite=flags.overwrite)
    return requests


def resolve(flags: GenerateFlags, dit: LoadedDiT) -> GenerateFlags:
    """The flags with everything filled in that the checkpoint decides.

    Raises:
        ValueError: guidance with a model that has never seen an empty prompt.
    """
    trained_without_null = dit.network.diffusion.text_dropout == 0 or not dit.network.model.text_embed_dim
    scale = flags.guidance_scale
    if scale is None:
        scale = 1.0 if trained_without_null else DEFAULT_GUIDANCE_SCALE
    if scale != 1.0 and trained_without_null:
        raise ValueError(
            f"--guidance-scale {scale} needs a model trained with text dropout; this one had "
            f"text_dropout {dit.network.diffusion.text_dropout}"
        )
    shift = flags.sigma_shift if flags.sigma_shift is not None else dit.network.diffusion.sigma_shift
    fps = flags.fps if flags.fps is not None else (dit.data["fps"] or 24)
    return replace(flags, guidance_scale=scale, sigma_shift=shift, fps=float(fps))


def build_pipelines(
    flags: GenerateFlags, dit: LoadedDiT, buckets: Iterable[Bucket], pgs: groups.ProcessGroups
) -> dict[Bucket, ImageToVideoPipeline]:
    """A pipeline for each bucket. They share the DiT and the frozen models that its checkpoint names."""
    fsae = load_autoencoder(dit.data, flags.fsae, pgs.device, DTYPES[flags.autoencoder_dtype])
    text_name = confirmed_name("text-encoder", dit.data["text_encoder"]["name"], flags.text_encoder)
    image_name = confirmed_name("image-encoder", dit.data["image_encoder"]["name"], flags.image_encoder)
    length = dit.data["text_encoder"]["max_length"] or None
    text = load_text_encoder(text_name, pgs.device, max_length=length, allow_download=flags.allow_download)
    image = load_image_encoder(image_name, pgs.device, allow_download=flags.allow_download)
    return {bucket: ImageToVideoPipeline(dit, fsae, text, image, bucket, pgs) for bucket in buckets}


def batches_of(
    requests: Sequence[Request], images: Sequence[torch.Tensor], buckets: Sequence[Bucket], batch_size: int
) -> Iterator[tuple[Bucket, list[Request], list[torch.Tensor]]]:
    """(bucket, requests, images) of what is generated together: each image in the bucket nearest to it.

    Args:
        images: uint8 [height, width, 3], one for each request.
    """
    chosen = [nearest_bucket(buckets, *image.shape[:2]) for image in images]
    for bucket in sorted(set(chosen)):
        members = [k for k, other in enumerate(chosen) if other == bucket]
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            yield bucket, [requests[k] for k in batch], [images[k] for k in batch]


def write_result(request: Request, clip: torch.Tensor, flags: GenerateFlags, dit: LoadedDiT, seconds: float) -> None:
    """The mp4, the contact sheet and the record beside it."""
    write_video(request.out, clip, flags.fps)
    write_contact_sheet(request.sheet, [(request.prompt, clip)])
    record = {
        "request": asdict(request),
        "flags": asdict(flags),
        "checkpoint": {"folder": flags.load, "iteration": dit.iteration, "autoencoder": dit.data["autoencoder"]},
        "shape": list(clip.shape),
        "seconds_per_clip": round(seconds, 3),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    write_json(request.record, record)


def generate(job: GenerateJob) -> None:
    """Load once, generate every request, write on rank 0."""
    requests = requests_of(job.generate)
    images = [read_image(request.image) for request in requests]
    pgs = groups.initialize(job.parallel)
    dit = load_dit(job.generate.load, job.parallel, pgs, job.generate.use_ema)
    flags = resolve(job.generate, dit)
    buckets = [Bucket.parse(text) for text in ([flags.bucket] if flags.bucket else dit.data["buckets"])]
    batches = list(batches_of(requests, images, buckets, flags.request_batch_size))
    pipelines = build_pipelines(flags, dit, {bucket for bucket, _, _ in batches}, pgs)
    sampling = Sampling(flags.num_inference_steps, flags.guidance_scale, flags.sigma_shift)

    def progress(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(steps, desc="denoising", disable=not pgs.is_rank_zero or None)

    for bucket, chosen, first_frames in batches:
        began = time.perf_counter()
        clips = pipelines[bucket](
            first_frames,
            [request.prompt for request in chosen],
            [request.seed for request in chosen],
            sampling,
            flags.negative_prompt,
            progress,
        )
        if pgs.is_rank_zero:
            seconds = (time.perf_counter() - began) / len(chosen)
            for request, clip in zip(chosen, clips.cpu(), strict=True):
                write_result(request, clip, flags, dit, seconds)
                print(f"{request.out}: {list(clip.shape)}, {seconds:.1f} s", flush=True)
    groups.barrier()
    groups.shutdown()


def main() -> None:
    """Parse the command line and generate."""
    generate(parse_job(GenerateJob))


if __name__ == "__main__":
    run_script(main)
