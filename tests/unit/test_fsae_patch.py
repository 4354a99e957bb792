"""Training with less memory gives the same numbers."""

import pytest
import torch

from megatron_fsvideo.config import FSAEConfig
from megatron_fsvideo.models.fsae import FSAE, PatchBox, decode_patch, draw_box, encode_sliced
from megatron_fsvideo.models.fsae.patch import cell_size, patch_halo
from tests.unit.fsae_fixtures import build, config, difference, patch_config, random_latents, random_video

KINDS = pytest.mark.parametrize("kind", ["causal", "standard", "lite"])


def patch_model(kind: str) -> FSAE:
    return build(patch_config(kind, attention_stages=1))


@KINDS
@pytest.mark.parametrize(
    "box", [(0, 3, 0, 9, 0, 8), (0, 3, 4, 12, 1, 11), (0, 2, 0, 12, 5, 12)], ids=["corner", "side", "time"]
)
def test_property_17_patch_is_the_whole_on_its_valid_region(kind: str, box: tuple[int, ...]) -> None:
    fsae = patch_model(kind)
    latents, features = random_latents(fsae.config, 3, 6, 6), fsae.first_frame_features(random_video(1, 96, 96))
    if kind == "standard" and box[1] < 3:
        with pytest.raises(ValueError, match="latents 0 to 2 of 3: 2 next to each cut are wrong"):
            decode_patch(fsae, latents, PatchBox(*box), features)
        return
    patch, region = decode_patch(fsae, latents, PatchBox(*box), features)
    halo, cell = patch_halo(fsae.config), cell_size(fsae.config)
    _, stop, top, bottom, left, right = box
    assert cell == 8 and region.frames == slice(0, 4 * stop - 3)
    assert region.rows == slice(cell * (top + halo if top else 0), cell * (bottom - halo if bottom < 12 else 12))
    assert region.columns == slice(cell * (left + halo if left else 0), cell * (right - halo if right < 12 else 12))
    assert difference(patch, region.of(fsae.decode(latents, features))) < 1e-12


@KINDS
def test_property_17_a_patch_from_the_middle_of_the_video_is_nearly_right(kind: str) -> None:
    fsae = patch_model(kind)
    latents = random_latents(fsae.config, 9, 2, 2)
    patch, region = decode_patch(fsae, latents, PatchBox(2, 9, 0, 4, 0, 4))
    assert region.frames == slice(13, 33), "latents 2 and 3 warm up, latent 4 begins with frame 13"
    whole = fsae.decode(latents)
    assert difference(patch, region.of(whole)) < 0.1
    assert difference(patch, whole[:, :, 12:32]) > 0.1, "not one frame off"


@pytest.mark.parametrize(
    "changes", [{}, {"upsampling": "sub-pixel"}, {"decoder_depths": (0, 1, 2, 1, 1), "encoder_depths": (0, 1, 1, 1, 1)}]
)
def test_property_18_the_valid_region_is_as_large_as_can_be(changes: dict) -> None:
    fsae = build(patch_config(attention_stages=1, **changes))
    halo, cell, side = patch_halo(fsae.config), cell_size(fsae.config), 24
    h = torch.randn(1, fsae.config.widths[3], 1, side, 1, dtype=torch.float64, requires_grad=True)

    def reached(row: int) -> list[int]:
        from megatron_fsvideo.models.fsae.context import DecodeContext, Window

        video = fsae.decoder.outer(h, Window(0, 0, side, 1), DecodeContext())
        (grad,) = torch.autograd.grad(video[:, :, :, row].sum(), h)
        return grad.abs().amax(dim=(0, 1, 2, 4)).nonzero().flatten().tolist()

    first, last = reached(12 * cell), reached(12 * cell - 1)
    assert first[0] == 12 - halo, "a pixel next to the trimmed cells sees all of them"
    assert last[-1] == 11 + halo


def test_property_18_paper_sizes() -> None:
    assert patch_halo(FSAEConfig()) == 7 and cell_size(FSAEConfig()) == 8
    assert patch_halo(FSAEConfig(upsampling="sub-pixel")) == 8
    with pytest.raises(ValueError, match="attention_stages 2 of 4 stages reach into them"):
        patch_halo(config())


def test_drawn_boxes_lie_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = [draw_box(generator, patch_config(attention_stages=1), (1, 4, 5, 4, 6), (3, 5, 20)) for _ in range(50)]
    assert {box.start for box in boxes} == {0, 1, 2} and {box.top for box in boxes} == {0, 1, 2, 3}
    assert all((box.stop - box.start, box.bottom - box.top, box.left, box.right) == (3, 5, 0, 12) for box in boxes)
    fsae = patch_model("causal")
    with pytest.raises(ValueError, match="rows of cells 0 to 9 are not inside the 4 of the whole"):
        decode_patch(fsae, random_latents(fsae.config, 3, 2, 2), PatchBox(0, 3, 0, 9, 0, 4))


def gradients(fsae: FSAE, run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    fsae.requires_grad_(True).zero_grad()
    loss = run()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in fsae.named_parameters() if p.grad is not None}


def assert_same(a: tuple, b: tuple) -> None:
    assert difference(a[0], b[0]) < 1e-12 and a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        assert (grad - b[1][name]).abs().max() <= 1e-10 * b[1][name].abs().max() + 1e-15, name


@KINDS
def test_property_29_recomputed_gradients_are_equal(kind: str) -> None:
    fsae, video = patch_model(kind), random_video(9, 32, 32)
    box = PatchBox(0, 3, 0, 4, 0, 4)

    def run() -> torch.Tensor:
        features = [feature.detach() for feature in fsae.first_frame_features(video)]
        patch, region = decode_patch(fsae, fsae.encode(video), box, features)
        return (patch - region.of(video)).square().mean()

    plain = gradients(fsae, run)
    fsae.recompute(True)
    assert_same(gradients(fsae, run), plain)
    assert len(plain[1]) == len(list(fsae.parameters()))


@pytest.mark.parametrize("latents_per_slice", [1, 2, 5])
def test_property_29_sliced_encoder_has_the_same_gradients(latents_per_slice: int) -> None:
    fsae, video = build(config()), random_video(17)
    weight = random_latents(fsae.config, 5)
    plain = gradients(fsae, lambda: (fsae.encode(video) * weight).sum())
    sliced = gradients(fsae, lambda: (encode_sliced(fsae, video, latents_per_slice) * weight).sum())
    assert_same(sliced, plain)
    with pytest.raises(ValueError, match="got 7; use the first 5 or read 9"):
        encode_sliced(fsae, random_video(7), 1)


def test_sliced_encoder_keeps_less() -> None:
    fsae, video = build(config()).requires_grad_(True), random_video(33)

    def kept(run) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run()
        del result
        return sum(storages.values())

    assert kept(lambda: encode_sliced(fsae, video, 1)) < 0.4 * kept(lambda: fsae.encode(video))
