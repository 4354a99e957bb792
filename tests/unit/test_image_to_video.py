"""Generation and validation videos decode with any decoder of the training latents' encoder, and show it the frame."""

from pathlib import Path

import pytest
import torch

from megatron_fsvideo.checkpoint.dit_release import DiTNetwork
from megatron_fsvideo.checkpoint.release import load_codec, save_fsae
from megatron_fsvideo.config import DIT_PRESETS, DiTJob, DiTParallelConfig, build_job
from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.video import from_unit
from megatron_fsvideo.inference.loading import LoadedDiT, load_autoencoder
from megatron_fsvideo.inference.pipeline import ImageToVideoPipeline, Sampling
from megatron_fsvideo.inference.validation_videos import ValidationVideos
from megatron_fsvideo.models.codecs import FSAECodec
from megatron_fsvideo.models.codecs.identity import fingerprint
from megatron_fsvideo.models.dit import build_dit
from megatron_fsvideo.models.fsae import FSAE
from megatron_fsvideo.parallel import groups
from tests.latent_fixtures import write_latent_dataset
from tests.parallel.harness import run_workers
from tests.unit.fsae_fixtures import build, config, count_attention

KINDS = ("causal", "standard", "lite")
FRAME = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Path]:
    """Phase 4's autoencoder, and phase 5's and 6's decoders for its encoder."""
    folder = tmp_path_factory.mktemp("releases")
    models = {kind: build(config(kind), seed).float() for seed, kind in enumerate(KINDS)}
    for kind, model in models.items():
        model.encoder.load_state_dict(models["causal"].encoder.state_dict())
        save_fsae(folder / kind, model)
    return {kind: folder / kind for kind in KINDS}


class Words:
    def __init__(self, width: int) -> None:
        self.width, self.moves = width, []

    def to(self, device: torch.device | str) -> None:
        self.moves.append(str(device))

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(len(captions), 6, self.width), torch.full((len(captions),), 6)


class Picture:
    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean() * torch.ones(len(images), 3, self.width)


def data_of(record: dict) -> dict:
    return {"autoencoder": record, "latent_mean": [0.1] * 4, "latent_std": [0.5] * 4}


def generate(folders: dict[str, Path]) -> dict:
    """Latents of one request and what each decoder makes of them, with the calls of its attention."""
    pgs = groups.initialize(DiTParallelConfig())
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"])
    model = build_dit(job.model, job.parallel, pgs, params_dtype=torch.float32).eval().requires_grad_(False)
    record = {"path": str(folders["causal"]), **load_codec(folders["causal"]).identity.record()}
    made = {}
    for kind, folder in folders.items():
        codec = load_autoencoder(data_of(record), str(folder), pgs.device, torch.float32)
        calls = count_attention(codec.fsae)
        dit = LoadedDiT(model, DiTNetwork(job.model, job.diffusion, bf16=False), data_of(record), 1)
        words, picture = Words(job.model.text_embed_dim), Picture(job.model.image_embed_dim)
        pipeline = ImageToVideoPipeline(dit, codec, words, picture, pgs)
        sampling, bucket = Sampling(2, 1.0, 3.0), Bucket(9, 32, 48)
        video = pipeline([FRAME], [""], [3], sampling, bucket=bucket)
        assert words.moves == ["cpu", "cpu"], "to this machine's device, and back"
        first = pipeline.prepare_image(FRAME, bucket)
        latents = pipeline.sample_latents(first, 3, [""], [3], sampling, "", iter)
        stored = 0.5 * latents + 0.1
        features = codec.fsae.first_frame_features(first) if kind != "causal" else None
        expected = from_unit(codec.fsae.decode(stored, features))
        unseen = from_unit(codec.fsae.decode(stored))
        made[kind] = dict(calls), len(codec.fsae.decoder.first_frame), video, expected, unseen
    return made


def test_generation_shows_the_first_frame_to_every_decoder_of_the_encoder(releases):
    made = run_workers(generate, 1, releases)[0]
    for kind, (calls, number, video, expected, unseen) in made.items():
        assert number == (0 if kind == "causal" else 2)
        # Once by the pipeline, once by the reference here.
        assert calls == dict.fromkeys(range(number), 2), f"{kind}: a module is not called"
        assert video.shape == (1, 9, 32, 48, 3) and torch.equal(video, expected)
        assert torch.equal(expected, unseen) == (kind == "causal")


def validate(folder: Path, data: Path, fsae: Path) -> tuple:
    """The calls of each attention module while validation videos are decoded."""
    pgs = groups.initialize(DiTParallelConfig())
    flags = {"num_validation_videos": 2, "num_sampling_steps": 1, "sample_interval": 1, "eval_iters": 1}
    paths = {"fsae": str(fsae), "tensorboard_dir": str(folder)}
    paths |= {"valid_data_path": (str(data),), "data_path": (str(data),)}
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"] | flags | paths)
    model = build_dit(job.model, job.parallel, pgs, params_dtype=torch.float32).eval()
    videos = ValidationVideos(job, model, LatentDataset([str(data)]), pgs)
    calls = count_attention(videos.codec.fsae)
    videos.write(1)
    return dict(calls), len(videos.codec.fsae.decoder.first_frame)


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_validation_videos_show_the_first_frame(kind, releases, tmp_path):
    encoder = load_codec(releases["causal"]).identity.encoder
    data = write_latent_dataset(tmp_path / "latents", 4, encoder)
    calls, number = run_workers(validate, 1, tmp_path, data, releases[kind])[0]
    assert number == 2 and calls.keys() == {0, 1} and min(calls.values()) >= 2, "two videos"


def test_an_old_checkpoint_takes_another_decoder_where_its_autoencoder_still_lies(releases, tmp_path):
    def load(record: dict, kind: str) -> FSAECodec:
        return load_autoencoder({"autoencoder": record}, str(releases[kind]), torch.device("cpu"), torch.float32)

    old = {"path": str(releases["causal"]), "fingerprint": fingerprint(load_codec(releases["causal"]).fsae)}
    for kind in KINDS:
        assert load(old, kind).fsae.config.decoder == kind
    moved = old | {"path": str(tmp_path / "gone")}
    assert load(moved, "causal").fsae.config.decoder == "causal"
    with pytest.raises(ValueError, match="trained on latents of the autoencoder .*gone .*, .*standard has another enc"):
        load(moved, "standard")
    save_fsae(tmp_path / "stranger", FSAE(config("causal")))
    with pytest.raises(ValueError, match="stranger has another encoder"):
        load_autoencoder({"autoencoder": old}, str(tmp_path / "stranger"), torch.device("cpu"), torch.float32)
