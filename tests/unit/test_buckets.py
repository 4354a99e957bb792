"""Buckets: what is refused, which is chosen, tokens and batch sizes."""

import pytest

from megatron_fsvideo.data.buckets import Bucket, choose_bucket


@pytest.mark.parametrize("frames", [0, 2, 4, 10, 16])
def test_frame_count_must_be_4k_plus_1(frames):
    with pytest.raises(ValueError, match=f"a clip of {frames} frames: the count must be 4k\\+1; try "):
        Bucket(frames, 64, 64)


def test_the_message_names_counts_that_work():
    with pytest.raises(ValueError, match="try 9 or 13"):
        Bucket.parse("10x64x64")


@pytest.mark.parametrize("text", ["9x96", "9x96x96x3", "ninex96x96", "9,96,96", "9x-96x96"])
def test_spelling(text):
    with pytest.raises(ValueError, match="not spelled frames x height x width"):
        Bucket.parse(text)
    assert str(Bucket.parse("121x704x1280")) == "121x704x1280"


def test_size_must_be_a_multiple_of_the_factor():
    with pytest.raises(ValueError, match=r"720x1280: height 720 is not a multiple .* factor 64; try 704 or 768"):
        Bucket(121, 720, 1280).check_factors(64)
    Bucket(121, 704, 1280).check_factors(64)
    with pytest.raises(ValueError, match="width 96 is not a multiple .* 64"):
        Bucket(9, 128, 96).check_factors(64)


def test_latent_shape_and_tokens():
    # 704x1280x121 is 31x11x20 = 6820 tokens.
    assert Bucket(121, 704, 1280).latent_shape(64) == (31, 11, 20)
    assert Bucket(121, 704, 1280).num_tokens(64) == 6820
    assert Bucket(9, 96, 96).num_tokens(8) == 432
    assert Bucket(9, 96, 96).num_tokens(8, patch_size=(1, 2, 2)) == 108
    with pytest.raises(ValueError, match="11 latent rows are not a multiple of the patch's 2"):
        Bucket(121, 704, 1280).num_tokens(64, patch_size=(1, 2, 2))


def test_choice_by_aspect_ratio_then_frames():
    buckets = [Bucket.parse(text) for text in ("9x64x128", "9x128x64", "9x96x96", "17x96x96", "1x96x96")]
    assert choose_bucket(buckets, 720, 1280, 30) == Bucket(9, 64, 128)
    assert choose_bucket(buckets, 1280, 720, 30) == Bucket(9, 128, 64)
    assert choose_bucket(buckets, 500, 520, 30) == Bucket(17, 96, 96)
    assert choose_bucket(buckets, 500, 520, 16) == Bucket(9, 96, 96)
    assert choose_bucket(buckets, 720, 1280, 3) == Bucket(1, 96, 96)
    assert choose_bucket(buckets[:4], 720, 1280, 3) is None
