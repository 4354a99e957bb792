"""Frame k is the k-th frame that a player shows, in the shape and colours that it shows."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
import torch

from megatron_fsvideo.data.video import VideoError, VideoReader, iterate_frames, measure, probe, read_video
from megatron_fsvideo.data.video.frame_table import FrameTable

SIZE = (32, 48)


def counted(path: Path, count: int = 200, options: dict[str, str] | None = None, codec: str = "libx264") -> Path:
    """A file whose frames tell their numbers, in columns that are black or white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = {"crf": "1", "g": "30", "sc_threshold": "0", "preset": "veryfast"} | (options or {})
        for k in range(count):
            bits = np.array([255 * (k >> place & 1) for place in range(8)], np.uint8)
            picture = np.broadcast_to(bits.repeat(SIZE[1] // 8)[None, :, None], (*SIZE, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def copied(source: Path, target: Path, keep=lambda index, packet: True, change=lambda index, data: data) -> Path:
    """A stream copy of the packets to keep, from the first of them at time 0, their bytes perhaps changed."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        first = None
        for index, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            if not keep(index, packet):
                continue
            first = packet.pts if first is None else first
            copy = av.Packet(change(index, bytes(packet)))
            copy.pts, copy.dts, copy.time_base = packet.pts - first, packet.dts - first, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            new.mux(copy)
    return target


def numbers(frames) -> list[int]:
    columns = np.stack([np.asarray(frame, np.float32).mean(axis=(0, 2)).reshape(8, -1)[:, 2:4] for frame in frames])
    return ((columns.mean(axis=2) > 127) << np.arange(8)).sum(axis=1).tolist()


def assert_every_way_agrees(path: Path) -> list[int]:
    """One pass, and clips in any order, by readers that have read anything before; returns the frames' numbers."""
    whole = torch.from_numpy(np.stack(list(iterate_frames(path))))
    table = measure(path)
    assert table.info.num_frames == len(whole)
    starts = [0, len(whole) - 3, len(whole) // 2, 70, 5, 90, len(whole) - 3]
    with VideoReader(path, table) as reader:
        for start in (start for start in starts if start + 3 <= len(whole)):
            assert torch.equal(reader.read(start, 3), whole[start : start + 3]), start
            with VideoReader(path, table) as fresh:
                assert torch.equal(fresh.read(start, 3), whole[start : start + 3]), start
    return numbers(whole)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counted(tmp_path_factory.mktemp("film") / "film.mp4")


def test_a_cut_without_encoding_shows_what_its_edit_list_says(film, tmp_path):
    # ffmpeg -ss 1.52 -c copy: packets from the keyframe before, and an edit list that hides those before the cut.
    with av.open(str(film)) as source:
        stream = source.streams.video[0]
        shown = int(Fraction(38, 25) / stream.time_base)
        path = tmp_path / "cut.mp4"
        with av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(stream)
            source.seek(shown, stream=stream, backward=True)
            for packet in source.demux(stream):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts - shown, packet.dts - shown, copy
                    target.mux(packet)
    with av.open(str(path)) as cut:
        assert cut.streams.video[0].frames == 170  # from keyframe 30, as its own header says
    assert assert_every_way_agrees(path) == list(range(38, 200))
    assert numbers(read_video(path, 100, 2)) == [138, 139]


@pytest.mark.parametrize(
    "options", [{"x264-params": "open-gop=1:bframes=3:b-adapt=0"}, {"x264-params": "intra-refresh=1"}]
)
def test_seeks_land_on_the_same_pictures(options, tmp_path):
    assert assert_every_way_agrees(counted(tmp_path / "a.mkv", options=options)) == list(range(200))


def test_what_a_file_falsely_calls_a_keyframe_is_not_trusted(tmp_path):
    source = counted(tmp_path / "a.mkv", codec="mpeg4", options={"g": "300", "bf": "0", "qscale": "2"})
    path = tmp_path / "false.mkv"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            # From such a frame on, the decoder shows the changes to a picture that it does not have.
            packet.is_keyframe |= index % 16 == 0
            packet.stream = stream
            new.mux(packet)
    assert_every_way_agrees(path)


def test_a_file_that_starts_amid_a_group_of_pictures(film, tmp_path):
    path = copied(film, tmp_path / "late.mkv", keep=lambda index, packet: index >= 17)
    assert assert_every_way_agrees(path)[-100:] == list(range(100, 200))


def test_dropped_frames_count_as_a_player_counts(film, tmp_path):
    simple = counted(tmp_path / "p.mp4", options={"bf": "0", "g": "1"})
    path = copied(simple, tmp_path / "dropped.mp4", keep=lambda index, packet: index % 3 != 1)
    assert assert_every_way_agrees(path) == [k for k in range(200) if k % 3 != 1]


@pytest.mark.parametrize("broken", [199, 77])
def test_what_decodes_is_used_with_a_warning(broken, film, tmp_path, capsys):
    path = copied(
        film, tmp_path / "one.mp4", change=lambda index, data: b"\x00\x00\x00\x01\xff" * 9 if index == broken else data
    )
    shown = assert_every_way_agrees(path)
    # Until the next keyframe, frames may show what the lost one would have changed.
    assert len(shown) >= 199 and shown[:75] == list(range(75))
    assert broken == 199 or shown[-100:] == list(range(100, 200))
    assert "one.mp4: 1 of 200 packets do not decode" in capsys.readouterr().err


def test_invisible_packets_are_no_frames(tmp_path):
    path = counted(
        tmp_path / "a.webm", 120, {"auto-alt-ref": "1", "lag-in-frames": "12", "crf": "10", "b": "1M"}, "libvpx"
    )
    shown = assert_every_way_agrees(path)
    assert len(shown) == 120 and measure(path).is_sound
    assert shown == list(range(120))


def bars(path: Path, size: tuple[int, int], ratio: Fraction) -> Path:
    """Left half black, right half white."""
    picture = np.zeros((*size, 3), np.uint8)
    picture[:, size[1] // 2 :] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(("ratio", "width"), [(Fraction(2), 96), (Fraction(8, 9), 43)])
def test_pixels_that_are_not_square_are_shown_at_display_size(suffix, ratio, width, tmp_path):
    path = bars(tmp_path / f"a.{suffix}", (32, 48), ratio)
    assert (probe(path).height, probe(path).width) == (32, width)
    frames = read_video(path)
    assert frames.shape == (3, 32, width, 3)
    middle = width // 2
    assert frames[0, :, : middle - 4].max() < 12 and frames[0, :, middle + 4 :].min() > 243
    with VideoReader(path) as reader:
        assert reader.read(short_side=16).shape == (3, 16, round(width / 2), 3)


def test_pixels_of_an_incredible_shape_are_refused(tmp_path):
    with pytest.raises(VideoError, match="a.mkv: has pixels of 12:1"):
        probe(bars(tmp_path / "a.mkv", (32, 48), Fraction(12)))


# Nits -> code value of 1, by SMPTE ST 2084 and ARIB STD-B67 (at a peak of 1000 nits).
CODES = {16: {0: 0.0, 26: 0.3798, 203: 0.5807, 1000: 0.7518}, 18: {0: 0.0, 203: 0.75, 1000: 1.0}}


@pytest.mark.parametrize("transfer", CODES)
def test_hdr_is_mapped_to_standard_range(transfer, tmp_path, capsys):
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for code in CODES[transfer].values():
            frame = av.VideoFrame(32, 32, "yuv420p10le")
            for plane, value in zip(frame.planes, (64 + round(876 * code), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    grey = read_video(path).float().mean(dim=(1, 2))
    assert (grey.amax(dim=1) - grey.amin(dim=1)).max() <= 2  # grey stays grey
    levels = grey.mean(dim=1).tolist()
    assert levels == sorted(levels) and levels[0] <= 2
    white, peak = levels[-2], levels[-1]
    # Reference white is bright, and what is brighter still differs from it: neither washed out nor cut.
    assert 110 <= white <= 200 and white + 25 <= peak <= 255
    assert "its colours are mapped to BT.709" in capsys.readouterr().err


def test_bt2020_colours_become_those_of_bt709(tmp_path):
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "gbrp10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 1, 0, 2
        frame = av.VideoFrame(32, 32, "gbrp10le")
        for plane, value in zip(frame.planes, (300, 300, 700), strict=True):  # green, blue, red
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    red, green, blue = read_video(path)[0, 16, 16].tolist()
    # BT.2020's red reaches further: the same light needs more of BT.709's red, and less of its green.
    assert red > 700 / 4 + 8 and green < 300 / 4 - 8 and blue < 300 / 4 + 8


def interlaced(path: Path, count: int = 130) -> Path:
    """A bright square that moves between the two fields of a frame, by four pixels each."""

    def field(k: int) -> np.ndarray:
        picture = np.full((64, 96, 3), 40, np.uint8)
        left = 4 * (k % 16)
        picture[16:48, left : left + 24] = 220
        return picture

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv444p"
        stream.options = {"crf": "1", "x264-params": "tff=1", "g": "20"}
        for k in range(count):
            picture = field(2 * k)
            picture[1::2] = field(2 * k + 1)[1::2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_fields_are_deinterlaced(tmp_path, capsys):
    path = interlaced(tmp_path / "fields.mp4")
    whole = torch.from_numpy(np.stack(list(iterate_frames(path)))).float()
    assert "is interlaced" in capsys.readouterr().err and measure(path).is_interlaced
    # A comb: rows differ from the mean of their neighbours.
    comb = (whole[:, 18:46:2] - (whole[:, 17:45:2] + whole[:, 19:47:2]) / 2).abs().mean(dim=(1, 2, 3))
    assert len(whole) == 130 and comb.max() < 4
    assert_every_way_agrees(path)


def resized(path: Path) -> Path:
    """A file that shows 20 frames of one size, and then of another."""
    parts = []
    for k, size in enumerate(((32, 48), (48, 64))):
        part = path.with_name(f"part{k}.h264")
        with av.open(str(part), "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for _ in range(20):
                frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 90, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))
    return path


def test_a_change_of_resolution_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"a.h264: changes its resolution from 48x32 to 64x48"):
        probe(resized(tmp_path / "a.h264"))


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "concat:a|b.mp4", b"caf\xe9.mp4", "ü 視.mp4", "%03d.mp4"])
def test_any_name_that_a_file_can_have(name, film, tmp_path, monkeypatch):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + os.fsencode(name)))
    shutil.copy(film, path)
    monkeypatch.chdir(tmp_path)
    assert probe(os.fsdecode(name)).num_frames == 200
    assert probe(path).num_frames == 200
    path.write_bytes(b"no video")
    with pytest.raises(VideoError) as error:
        probe(path)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name", ["script.mp4", "script.ffconcat", "list.m3u8"])
def test_scripts_do_not_make_ffmpeg_open_other_files(name, film, tmp_path):
    shutil.copy(film, tmp_path / "secret.mp4")
    text = (
        "#EXTM3U\n#EXTINF:8,\nsecret.mp4\n#EXT-X-ENDLIST\n"
        if name.endswith("m3u8")
        else "ffconcat version 1.0\nfile secret.mp4\n"
    )
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError, match="is a container or script that is not read|Invalid data"):
        probe(tmp_path / name)


def test_frames_at_rest_need_no_memory(film):
    """What is skipped is not kept, and what is kept is cut to size at once."""
    with VideoReader(film) as reader:
        kept = 0
        for frame in reader.frames(range(0, 200, 50)):
            kept += 1
            assert len(reader._recent) <= 3 and frame.shape == (*SIZE, 3)
        assert kept == 4


def test_tables_are_equal_however_often_they_are_made(film):
    one, two = measure(film), measure(film)
    assert isinstance(one, FrameTable) and one.info == two.info
    assert np.array_equal(one.marks, two.marks) and np.array_equal(one.times, two.times)
