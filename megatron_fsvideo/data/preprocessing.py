"""Encode a list of videos to a latent dataset: any number of processes, no communication, restart where it stopped.

The list is cut into shards whose names are hashes of all they depend on. Process r of n makes shards r, r + n, ...; a
shard whose manifest is there is finished. Latents and embeddings are looked up by key in the finished shards of earlier
runs first: new captions or more videos encode only what is new. Whoever finishes the last shard writes `dataset.json`
and removes the shards that the list no longer asks for.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.clips import (
    MISSING,
    Clip,
    ClipOptions,
    Source,
    expand,
    file_digest,
    image_key,
    latent_key,
    text_key,
)
from megatron_fsvideo.data.dataset_json import (
    AutoencoderRecord,
    ImageRecord,
    LatentSpace,
    TextRecord,
    write_dataset_json,
)
from megatron_fsvideo.data.folder_lock import FolderLock
from megatron_fsvideo.data.frame_files import ImageReader
from megatron_fsvideo.data.latent_shards import (
    DATASET_FILE,
    FORMAT_VERSION,
    SHARD_FOLDER,
    LatentSample,
    SampleEntry,
    ShardError,
    ShardManifest,
    find_manifests,
    hash_key,
    read_json,
    read_manifest,
    read_sample,
    write_shard,
)
from megatron_fsvideo.data.manifest import VideoEntry
from megatron_fsvideo.data.video import VideoError, VideoReader, to_unit
from megatron_fsvideo.models.codecs import CodecIdentity, LatentCodec

logger = logging.getLogger(__name__)

# A whole file becomes an unknown number of clips; it counts as this many when files are dealt to shards.
CLIPS_PER_FILE = 16
_SHARD_FILE = re.compile(r"\d{6}-[0-9a-f]{16}\.(tar|json)")
TEXT_BATCH = 32
PIXELS_WAITING = 1 << 27
"""Pixels x frames of the clips that wait to be encoded together: one of 121x704x1280, or 1,600 of 9x96x96."""


class Text(Protocol):
    """Interface of a text encoder (models/frozen/encoders.py)."""

    name: str
    embed_dim: int
    max_length: int

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [b, l, e] and rows of each."""


class Image(Protocol):
    """Interface of an image encoder (models/frozen/encoders.py)."""

    name: str
    embed_dim: int
    num_tokens: int

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, h, w] in [-1, 1] -> [b, n, e]."""


@dataclass(frozen=True)
class Encoders:
    """The frozen models of a preprocessing run.

    Attributes:
        autoencoder_path: where its weights came from, for the record.
    """

    autoencoder: LatentCodec
    autoencoder_path: str
    text: Text
    image: Image


@dataclass(frozen=True)
class PreprocessOptions:
    """Settings of a preprocessing run.

    Attributes:
        batch_size: clips encoded at once; fewer where those do not fit into `PIXELS_WAITING`.
        samples_per_shard: clips a shard is planned for.
        max_bad_fraction: a larger share of unreadable entries stops the run, if it is more than one; 0 allows none.
        negative_prompt: stored encoded, for guidance.
    """

    clips: ClipOptions
    batch_size: int = 8
    samples_per_shard: int = 256
    max_bad_fraction: float = 0.01
    negative_prompt: str = ""


@dataclass(frozen=True)
class PlannedShard:
    """A shard's name, which depends on all that its content depends on, and its entries with their files' digests."""

    name: str
    entries: tuple[tuple[VideoEntry, str], ...]


@dataclass(frozen=True)
class Job:
    """One run: what is encoded, by what, how, to where, and what earlier runs left (latent key -> sample).

    Attributes:
        fingerprint: under which the folder knows the autoencoder, from `check_cache`.
    """

    output: Path
    fingerprint: str
    entries: tuple[VideoEntry, ...]
    encoders: Encoders
    options: PreprocessOptions
    plan: tuple[PlannedShard, ...]
    earlier: dict[str, tuple[Path, SampleEntry]]


def preprocess(
    output: Path,
    entries: Sequence[VideoEntry],
    encoders: Encoders,
    options: PreprocessOptions,
    rank: int = 0,
    world_size: int = 1,
) -> bool:
    """Make this process's shards. True when the dataset is complete.

    Raises:
        ShardError: the folder holds latents of another autoencoder, or damaged shards.
        ValueError: sizes that the autoencoder cannot divide, a folder that another run writes, or too many unreadable
            videos. Finished shards stay.
    """
    for bucket in options.clips.buckets:
        compression = encoders.autoencoder.compression
        bucket.check_factors(compression.spatial, compression.temporal)
    with FolderLock(output, "encoding", rank):
        manifests, fingerprint = check_cache(output, encoders.autoencoder.identity)
        entries = tuple(dict.fromkeys(entries))
        earlier = {
            sample.latent_key: (output / SHARD_FOLDER / manifest.shard, sample)
            for manifest in manifests.values()
            for sample in manifest.samples
        }
        plan = plan_shards(entries, fingerprint, encoders, options)
        job = Job(output, fingerprint, entries, encoders, options, plan, earlier)
        skipped = 0
        for index in range(rank, len(job.plan), world_size):
            shard = job.plan[index]
            began = time.monotonic()
            manifest = manifests.get(shard.name)
            what = "finished before"
            if manifest is None:
                manifest = _make_shard(job, shard, skipped)
                seconds = time.monotonic() - began
                what = f"{seconds:.1f} s, {len(manifest.samples) / seconds:.1f} clips/s"
            skipped += len(manifest.skipped)
            logger.info(
                "shard %d of %d: %d clips, %d skipped, %s",
                index + 1, len(job.plan), len(manifest.samples), len(manifest.skipped), what,
            )  # fmt: skip
        return _finish(job)


def check_cache(output: Path, identity: CodecIdentity) -> tuple[dict[str, ShardManifest], str]:
    """Finished shards of a folder by name, and the fingerprint that they have.

    Folders of earlier versions know an autoencoder by all its weights; they go on so.

    Raises:
        ShardError: one was made by another autoencoder, or is damaged.
    """
    manifests = {path.stem: read_manifest(path) for path in find_manifests(output)}
    made_by = {manifest.autoencoder for manifest in manifests.values()}
    if (output / DATASET_FILE).is_file():
        made_by.add(read_json(output / DATASET_FILE).get("autoencoder", {}).get("fingerprint", "unknown"))
    if stale := sorted(made_by - {identity.encoder, identity.weights}):
        raise ShardError(
            f"{output}: stale cache: its latents were made by autoencoder {stale[0][:12]}, this one is "
            f"{identity.encoder[:12]}; choose another --output, or delete the folder"
        )
    return manifests, identity.weights if identity.weights in made_by else identity.encoder


def plan_shards(
    entries: Sequence[VideoEntry], fingerprint: str, encoders: Encoders, options: PreprocessOptions
) -> tuple[PlannedShard, ...]:
    """Cut the list, in order, into shards of about `samples_per_shard` clips."""
    digests = {path: file_digest(path) for path in sorted({entry.path for entry in entries})}
    groups: list[list[tuple[VideoEntry, str]]] = []
    weight = options.samples_per_shard
    seen: set[tuple[object, ...]] = set()
    duplicates: list[str] = []
    for entry in sorted(entries, key=lambda e: (e.source, e.start or 0, e.num_frames or 0, e.caption)):
        content = digests[entry.path], entry.start, entry.num_frames, entry.caption
        if digests[entry.path] != MISSING and content in seen:
            duplicates.append(entry.name)
            continue
        seen.add(content)
        if weight >= options.samples_per_shard:
            groups.append([])
            weight = 0
        groups[-1].append((entry, digests[entry.path]))
        weight += CLIPS_PER_FILE if entry.start is None else 1
    if duplicates:
        logger.warning(
            "%d entries are equal to others, captions included, and left out; the first: %s",
            len(duplicates), duplicates[0],
        )  # fmt: skip
    settings = (
        FORMAT_VERSION,
        fingerprint,
        (encoders.text.name, encoders.text.max_length),
        encoders.image.name,
        options.clips,
    )
    planned = []
    for index, group in enumerate(groups):
        content = [(digest, entry.source, entry.start, entry.num_frames, entry.caption) for entry, digest in group]
        planned.append(PlannedShard(f"{index:06d}-{hash_key(settings, content)[:16]}", tuple(group)))
    return tuple(planned)


def _make_shard(job: Job, shard: PlannedShard, skipped_before: int) -> ShardManifest:
    skipped: list[tuple[str, str]] = []
    clips = _readable_clips(job, shard, skipped, skipped_before)
    samples = _encode(job, clips)
    return write_shard(job.output / SHARD_FOLDER, shard.name, job.fingerprint, samples, skipped)


@dataclass(frozen=True)
class _Loaded:
    """A clip, its keys, its frames uint8 [f, h, w, 3] (None when nothing needs them), its sample of an earlier run."""

    clip: Clip
    keys: dict[str, str]
    frames: torch.Tensor | None
    earlier: LatentSample | None


def _readable_clips(
    job: Job, shard: PlannedShard, skipped: list[tuple[str, str]], skipped_before: int
) -> Iterator[_Loaded]:
    """Clips of a shard, each decoded when it is asked for. Entries that cannot be read are appended to `skipped`.

    Raises:
        ValueError: more than the allowed share of the run's entries is unreadable.
    """
    with ExitStack() as opened:
        source: Source | None = None
        unreadable: dict[str, VideoError] = {}
        for entry, digest in shard.entries:
            try:
                if entry.problem:
                    raise VideoError(entry.problem)
                if source is None or source.path != entry.path:
                    opened.close()
                    source = _open_source(entry, unreadable)
                    opened.enter_context(source.reader)
                for clip in expand(entry, source, job.options.clips):
                    yield _load(job, clip, digest, source.reader)
            except (VideoError, OSError) as error:
                skipped.append((entry.name, str(error)))
                logger.warning("skipped: %s", error)
                _check_bad(job, skipped_before + len(skipped), str(error))


def _open_source(entry: VideoEntry, unreadable: dict[str, VideoError]) -> Source:
    """The file of an entry. `unreadable` collects errors, so that a file of many entries is not decoded for each."""
    if entry.path in unreadable:
        raise unreadable[entry.path]
    try:
        return Source(entry)
    except VideoError as error:
        unreadable[entry.path] = error
        raise


def _load(job: Job, clip: Clip, digest: str, reader: VideoReader | ImageReader) -> _Loaded:
    encoders = job.encoders
    keys = {
        "latent_key": latent_key(clip, digest, job.fingerprint),
        "text_key": text_key(clip.entry.caption, encoders.text.name, encoders.text.max_length),
        "image_key": image_key(clip, digest, encoders.image.name),
    }
    found = job.earlier.get(keys["latent_key"])
    earlier = read_sample(*found) if found is not None else None
    frames = None
    if earlier is None or earlier.record["image_key"] != keys["image_key"]:
        size = clip.bucket.height, clip.bucket.width
        frames = reader.read(clip.start, clip.bucket.num_frames, fps=clip.fps, size=size)
    return _Loaded(clip, keys, frames, earlier)


def _encode(job: Job, clips: Iterator[_Loaded]) -> Iterator[LatentSample]:
    """Encode clips in batches of one bucket, with at most `PIXELS_WAITING` in memory, or one clip."""
    waiting: dict[Bucket, list[_Loaded]] = {}
    captions: dict[str, torch.Tensor] = {}
    for loaded in clips:
        bucket = loaded.clip.bucket
        # Room is made first: the clip that has just been read is in memory already.
        while waiting and _pixels(waiting) + bucket.num_pixels > PIXELS_WAITING:
            fullest = max(sorted(waiting), key=lambda b: len(waiting[b]) * b.num_pixels)
            yield from _encode_batch(job.encoders, waiting.pop(fullest), captions)
        batch = waiting.setdefault(bucket, [])
        batch.append(loaded)
        if len(batch) == job.options.batch_size or bucket.num_pixels * len(batch) >= PIXELS_WAITING:
            yield from _encode_batch(job.encoders, waiting.pop(bucket), captions)
    for bucket in sorted(waiting):
        yield from _encode_batch(job.encoders, waiting[bucket], captions)


def _pixels(waiting: dict[Bucket, list[_Loaded]]) -> int:
    return sum(len(batch) * bucket.num_pixels for bucket, batch in waiting.items())


def _encode_batch(
    encoders: Encoders, batch: list[_Loaded], captions: dict[str, torch.Tensor]
) -> Iterator[LatentSample]:
    """Samples of a batch; what an earlier run has made is taken from there. `captions` collects encoded texts."""
    latents: dict[int, torch.Tensor] = {}
    images: dict[int, torch.Tensor] = {}
    texts: dict[int, torch.Tensor] = {}
    for k, loaded in enumerate(batch):
        if loaded.earlier is not None:
            latents[k] = loaded.earlier.latents
            if loaded.earlier.record["image_key"] == loaded.keys["image_key"]:
                images[k] = loaded.earlier.image
            if loaded.earlier.record["text_key"] == loaded.keys["text_key"]:
                texts[k] = loaded.earlier.text
    if todo := [k for k in range(len(batch)) if k not in latents]:
        latents |= dict(zip(todo, _encode_latents(encoders, [batch[k] for k in todo]), strict=True))
    if todo := [k for k in range(len(batch)) if k not in images]:
        images |= dict(zip(todo, _encode_images(encoders, [batch[k] for k in todo]), strict=True))
    todo = [k for k in range(len(batch)) if k not in texts]
    _encode_texts(encoders, [batch[k].clip.entry.caption for k in todo], captions)
    texts |= {k: captions[batch[k].clip.entry.caption] for k in todo}
    for k, loaded in enumerate(batch):
        yield LatentSample(latents[k], texts[k], images[k], _record(loaded))


@torch.no_grad()
def _encode_latents(encoders: Encoders, batch: list[_Loaded]) -> list[torch.Tensor]:
    video = torch.stack([to_unit(loaded.frames) for loaded in batch])  # [b, 3, f, h, w]
    latents = encoders.autoencoder.encode(video).to("cpu", torch.bfloat16)
    if not latents.isfinite().all():
        raise ValueError(f"the autoencoder gives latents that are not finite, at {batch[0].clip.entry.name}")
    return list(latents)


@torch.no_grad()
def _encode_images(encoders: Encoders, batch: list[_Loaded]) -> list[torch.Tensor]:
    first_frames = torch.stack([to_unit(loaded.frames[:1])[:, 0] for loaded in batch])  # [b, 3, h, w]
    embeddings = encoders.image.encode(first_frames).to("cpu", torch.bfloat16)
    return list(embeddings if encoders.image.embed_dim else torch.zeros(len(batch), 0, 0, dtype=torch.bfloat16))


def _encode_texts(encoders: Encoders, texts: Sequence[str], captions: dict[str, torch.Tensor]) -> None:
    """Add the texts that `captions` lacks: bf16 [own rows, e]."""
    new = [text for text in dict.fromkeys(texts) if text not in captions]
    for begin in range(0, len(new), TEXT_BATCH):
        chunk = new[begin : begin + TEXT_BATCH]
        embeddings, lengths = encoders.text.encode(chunk)
        for text, embedding, length in zip(chunk, embeddings, lengths.tolist(), strict=True):
            captions[text] = embedding[:length].to("cpu", torch.bfloat16).clone()


def _record(loaded: _Loaded) -> dict[str, Any]:
    clip, keys = loaded.clip, loaded.keys
    return keys | {
        "key": hash_key(*keys.values()),
        "caption": clip.entry.caption,
        "source": clip.entry.source,
        "start": clip.start,
        "num_frames": clip.bucket.num_frames,
        "fps": clip.fps,
        "bucket": str(clip.bucket),
    }


def _check_bad(job: Job, count: int, last: str) -> None:
    total, share = len(job.entries), job.options.max_bad_fraction
    # One bad item among a few is a larger share than anybody would give, and no reason to stop.
    if count > (max(1, share * total) if share else 0):
        raise ValueError(
            f"{count} of {total} videos cannot be read, more than --max-bad-fraction {job.options.max_bad_fraction}; "
            f"the last: {last}"
        )


def _finish(job: Job) -> bool:
    """Write `dataset.json` when all shards are there. Processes that come here together write the same bytes."""
    folder = job.output / SHARD_FOLDER
    paths = [folder / f"{shard.name}.json" for shard in job.plan]
    if not all(path.is_file() for path in paths):
        return False
    manifests = [read_manifest(path) for path in paths]
    skipped = [pair for manifest in manifests for pair in manifest.skipped]
    if skipped:
        _check_bad(job, len(skipped), skipped[-1][1])
    if not any(manifest.samples for manifest in manifests):
        last = f"; the last: {skipped[-1][1]}" if skipped else ""
        raise ValueError(f"{job.output}: none of the {len(job.entries)} videos gave a clip{last}")
    captions: dict[str, torch.Tensor] = {}
    _encode_texts(job.encoders, ["", job.options.negative_prompt], captions)
    negative = job.options.negative_prompt
    space = _latent_space(job)
    write_dataset_json(job.output, space, manifests, captions[""], captions[negative], negative)
    _remove_others(folder, {shard.name for shard in job.plan})
    return True


def _latent_space(job: Job) -> LatentSpace:
    encoders = job.encoders
    return LatentSpace(
        AutoencoderRecord.of(encoders.autoencoder, encoders.autoencoder_path, job.fingerprint),
        TextRecord(encoders.text.name, encoders.text.embed_dim, encoders.text.max_length),
        ImageRecord(encoders.image.name, encoders.image.embed_dim, encoders.image.num_tokens),
    )


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Delete the shards of earlier lists and what killed processes left."""
    for path in folder.iterdir():
        is_stale = _SHARD_FILE.fullmatch(path.name) and path.stem not in keep
        # Nothing else is ours to delete: the folder may have been somebody's before.
        if is_stale or (path.name.startswith(".") and path.suffix == ".tmp"):
            path.unlink(missing_ok=True)
