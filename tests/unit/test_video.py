"""Video files: exact frame counts and frames, resizing, writing, damaged files."""

import re

import av
import numpy as np
import pytest
import torch
from data_fixtures import moving_video

from megatron_fsvideo.data.listing import list_videos
from megatron_fsvideo.data.video import (
    VideoError,
    VideoReader,
    from_unit,
    iterate_frames,
    probe,
    read_video,
    resize_and_crop,
    resize_short_side,
    to_unit,
    write_video,
)


@pytest.fixture
def numbered(tmp_path):
    """A video of 200 frames whose brightness tells the frame number."""
    frames = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 48, 3)
    write_video(tmp_path / "numbered.mp4", frames, fps=25, quality=0, keyframe_interval=30)
    return tmp_path / "numbered.mp4"


def numbers(frames: torch.Tensor) -> list[int]:
    return [round(frame.float().mean().item()) for frame in frames]


def test_probe_is_exact(numbered):
    info = probe(numbered)
    assert (info.num_frames, info.height, info.width, info.fps) == (200, 32, 48, 25.0)


@pytest.mark.parametrize("start", [0, 3, 65, 100, 191])
def test_reads_exactly_the_frames_asked_for(numbered, start):
    assert numbers(read_video(numbered, start, 9)) == pytest.approx(range(start, start + 9), abs=1)


def test_stride_and_rate(numbered):
    assert numbers(read_video(numbered, 10, 5, stride=3)) == pytest.approx([10, 13, 16, 19, 22], abs=1)
    assert numbers(read_video(numbered, 10, 5, fps=10)) == pytest.approx([10, 13, 15, 18, 20], abs=1)
    assert len(read_video(numbered, 190)) == 10


def test_clips_in_any_order_equal_one_pass(numbered):
    whole = torch.from_numpy(np.stack(list(iterate_frames(numbered))))
    with VideoReader(numbered) as reader:
        for start in (0, 20, 9, 150, 70, 69, 0, 191):
            assert torch.equal(reader.read(start, 9), whole[start : start + 9]), start


def test_range_outside_the_file_names_it(numbered):
    with pytest.raises(VideoError, match=r"numbered.mp4: has 200 frames, asked for frames 195 to 203"):
        read_video(numbered, 195, 9)


def test_quality_and_full_color(tmp_path):
    video = moving_video(9, 64, 64)
    errors = []
    for name, quality, full in (("a.mp4", 40, False), ("b.mp4", 18, False), ("c.mp4", 6, True)):
        write_video(tmp_path / name, video, 8, quality, full_color=full)
        assert probe(tmp_path / name).num_frames == 9
        errors.append((read_video(tmp_path / name).float() - video.float()).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1.5


def test_write_refuses_what_h264_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="even sides, got 33x32"):
        write_video(tmp_path / "odd.mp4", torch.zeros(1, 33, 32, 3, dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "float.mp4", torch.zeros(1, 32, 32, 3), 8)
    assert list(tmp_path.iterdir()) == []


def test_resize_keeps_the_aspect_ratio():
    frames = torch.zeros(2, 40, 100, 3, dtype=torch.uint8)
    frames[:, :, 50:] = 255
    assert resize_short_side(frames, 20).shape == (2, 20, 50, 3)
    cropped = resize_and_crop(frames, 32, 32)
    assert cropped.shape == (2, 32, 32, 3)
    # The edge in the middle stays in the middle, and is as steep as before.
    assert cropped[0, 16, :14].max() == 0 and cropped[0, 16, 18:].min() == 255


def test_scaling_while_decoding_is_close_to_scaling_afterwards(tmp_path):
    write_video(tmp_path / "a.mp4", moving_video(5, 96, 160), 8, quality=4)
    with VideoReader(tmp_path / "a.mp4") as reader:
        fast = reader.read(short_side=48)
        assert fast.shape == (5, 48, 80, 3)
        # Not equal: strong colours are cut to the RGB range before or after averaging.
        assert (fast.float() - resize_short_side(reader.read(), 48).float()).abs().mean() < 5
        assert reader.read(short_side=200).shape == (5, 96, 160, 3)


def test_unit_range_round_trip():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    video = to_unit(frames)
    assert video.shape == (3, 1, 16, 16) and video.min() == -1 and video.max() == 1
    assert torch.equal(from_unit(video), frames)


@pytest.mark.parametrize("keep", [0.1, 0.97])
def test_file_without_its_index_is_named(tmp_path, keep):
    whole = tmp_path / "whole.mp4"
    write_video(whole, moving_video(60, 64, 64), 8)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: int(keep * whole.stat().st_size)])
    for read in (probe, read_video, lambda path: list(iterate_frames(path))):
        with pytest.raises(VideoError, match="cut.mp4"):
            read(cut)


def test_of_a_truncated_file_the_frames_that_decode_are_used(tmp_path, capsys):
    whole = tmp_path / "whole.mp4"
    write_video(whole, moving_video(60, 64, 64), 8)
    front = tmp_path / "front.mp4"
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert probe(front).num_frames == 60
    front.write_bytes(front.read_bytes()[: int(0.7 * front.stat().st_size)])
    rest = read_video(front)
    # The last ones refer to a frame that is gone.
    assert 20 < len(rest) < 60 and torch.equal(rest[:-4], read_video(whole)[: len(rest) - 4])
    assert torch.equal(torch.from_numpy(np.stack(list(iterate_frames(front)))), rest)
    said = capsys.readouterr().err
    assert "front.mp4: 1 of " in said and re.search(r"front.mp4: truncated: \d+ of 60 frames", said)


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(VideoError, match="text.mp4: not a readable video"):
        probe(tmp_path / "text.mp4")
    with pytest.raises(VideoError, match="none.mp4: no such file"):
        read_video(tmp_path / "none.mp4")


def test_list_videos(tmp_path, numbered):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "A.MKV").touch()
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in list_videos(tmp_path)] == ["numbered.mp4", "A.MKV"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video file below"):
        list_videos(tmp_path / "empty")
