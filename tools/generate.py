"""Generate video from an image and a prompt with a checkpoint of pretrain_dit.py.

    python tools/generate.py --load checkpoints/dit --image photo.png --prompt "pan left" \
        --out out.mp4

    torchrun --nproc-per-node 2 tools/generate.py --load checkpoints/dit --tensor-model-parallel-size 2 ...

The architecture, the autoencoder and the encoders come from the checkpoint. Beside out.mp4 it writes out.png, a contact
sheet, and out.json, everything that is needed to repeat it. Many at once: `--requests requests.jsonl` with an object
with image, prompt, out and optionally seed a line.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from megatron_fsvideo.config import DiTParallelConfig, parse_job, run_script
from megatron_fsvideo.config.rules import Checked, Count, PathText, Positive, PositiveInt
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.video import write_video
from megatron_fsvideo.inference.contact_sheet import write_contact_sheet
from megatron_fsvideo.inference.loading import LoadedDiT, load_autoencoder, load_dit
from megatron_fsvideo.inference.pipeline import ImageToVideoPipeline, Sampling
from megatron_fsvideo.models.encoders import load_image_encoder, load_text_encoder
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
    """JSONL file with one request per line: image, prompt, out and optionally seed. It replaces these flags."""
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
    """Shape of the video, frames x height x width. None takes the checkpoint's first bucket."""
    fps: Positive | None = None
    """Frames per second of the MP4. None takes the training data's."""
    fsae: PathText | None = None
    """Folder of the autoencoder, if it has moved since training."""
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


@dataclass(frozen=True)
class Request:
    """One clip to generate."""

    image: str
    prompt: str
    out: str
    seed: int


def read_requests(flags: GenerateFlags) -> list[Request]:
    """The requests of the flags or of the --requests file.

    Raises:
        ValueError: neither or both are given, or a line lacks a field.
    """
    single = flags.image is not None and flags.out is not None
    if single == (flags.requests is not None):
        raise ValueError("give --image, --prompt and --out, or --requests")
    if single:
        return [Request(flags.image, flags.prompt, flags.out, flags.seed)]
    requests = []
    for number, line in enumerate(Path(flags.requests).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            requests.append(Request(values["image"], values["prompt"], values["out"], values.get("seed", flags.seed)))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(
                f"{flags.requests} line {number} is no request with image, prompt and out: {error}"
            ) from None
    return requests


def read_image(path: str) -> torch.Tensor:
    """uint8 [height, width, 3].

    Raises:
        ValueError: not an image.
    """
    try:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read") from error


def resolve(flags: GenerateFlags, dit: LoadedDiT) -> GenerateFlags:
    """The flags with everything filled in that the checkpoint decides.

    Raises:
        ValueError: guidance with a model that has never seen an empty prompt.
    """
    trained_without_null = dit.job.diffusion.text_dropout == 0 or not dit.job.model.text_embed_dim
    scale = flags.guidance_scale
    if scale is None:
        scale = 1.0 if trained_without_null else DEFAULT_GUIDANCE_SCALE
    if scale != 1.0 and trained_without_null:
        raise ValueError(
            f"--guidance-scale {scale} needs a model trained with text dropout; this one had "
            f"text_dropout {dit.job.diffusion.text_dropout}"
        )
    shift = flags.sigma_shift if flags.sigma_shift is not None else dit.job.diffusion.sigma_shift
    fps = flags.fps if flags.fps is not None else (dit.data["fps"] or 24)
    bucket = flags.bucket or dit.data["buckets"][0]
    return replace(flags, guidance_scale=scale, sigma_shift=shift, fps=float(fps), bucket=bucket)


def build_pipeline(flags: GenerateFlags, dit: LoadedDiT, pgs: groups.ProcessGroups) -> ImageToVideoPipeline:
    """Everything beside the DiT, from what the checkpoint says about its data."""
    fsae = load_autoencoder(dit.data, flags.fsae, pgs.device, DTYPES[flags.autoencoder_dtype])
    text, image = dit.data["text_encoder"], dit.data["image_encoder"]
    return ImageToVideoPipeline(
        dit,
        fsae,
        load_text_encoder(text["name"], pgs.device, max_length=text["max_length"] or None),
        load_image_encoder(image["name"], pgs.device),
        Bucket.parse(flags.bucket),
        pgs,
    )


def write_result(request: Request, clip: torch.Tensor, flags: GenerateFlags, dit: LoadedDiT, seconds: float) -> None:
    """The mp4, the contact sheet and the record beside it."""
    out = Path(request.out)
    write_video(out, clip, flags.fps)
    write_contact_sheet(out.with_suffix(".png"), [(request.prompt, clip)])
    record = {
        "request": asdict(request),
        "flags": asdict(flags),
        "checkpoint": {"folder": flags.load, "iteration": dit.iteration, "autoencoder": dit.data["autoencoder"]},
        "shape": list(clip.shape),
        "seconds_per_clip": round(seconds, 3),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def generate(job: GenerateJob) -> None:
    """Load once, generate every request, write on rank 0."""
    requests = read_requests(job.generate)
    images = [read_image(request.image) for request in requests]
    pgs = groups.initialize(job.parallel)
    dit = load_dit(job.generate.load, job.parallel, pgs, job.generate.use_ema)
    flags = resolve(job.generate, dit)
    pipeline = build_pipeline(flags, dit, pgs)
    sampling = Sampling(flags.num_inference_steps, flags.guidance_scale, flags.sigma_shift)

    def progress(steps: Iterable[int]) -> Iterable[int]:
        return tqdm(steps, desc="denoising", disable=not pgs.is_rank_zero or None)

    for start in range(0, len(requests), flags.request_batch_size):
        chosen = requests[start : start + flags.request_batch_size]
        began = time.perf_counter()
        clips = pipeline(
            images[start : start + len(chosen)],
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
