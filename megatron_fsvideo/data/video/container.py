"""Opening video files: which names, containers and protocols are accepted, and what a refusal says."""

from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

# FFmpeg's names of the containers that hold their own frames. Playlists and scripts (concat, hls, dash, image2) would
# make FFmpeg open whatever other files they name.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpeg", "mpegts", "mpegtsraw", "mpegvideo", "m4v", "h264",
    "hevc", "av1", "obu", "ivf", "flv", "asf", "ogg", "mxf", "gif", "apng", "nut", "dv", "wtv", "rm", "yuv4mpegpipe",
    "vc1", "h263", "mjpeg", "vvc",
)  # fmt: skip
# Seconds that one read of a file may take, so that a damaged file cannot hold FFmpeg's parsers for ever.
READ_SECONDS = 60.0


class VideoError(ValueError):
    """A video file that cannot be read as asked. The message is one line that names the file."""


def shown_name(path: str | Path) -> str:
    """A path that can be printed, whatever bytes the file system has in it."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def open_video(path: str | Path, num_threads: int = 0) -> tuple[Any, Any]:
    """(container, video stream); close the container.

    Args:
        num_threads: of the decoder; 0 lets FFmpeg choose.

    Raises:
        VideoError: no such file, not a video, or a container that is not read.
    """
    name = shown_name(path)
    if not Path(path).is_file():
        raise VideoError(f"{name}: no such file")
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    try:
        # With the protocol spelled out, a colon in the name cannot name one.
        container = av.open(f"file:{path}", options=options, timeout=READ_SECONDS, metadata_errors="replace")
    except av.ArgumentError as error:
        raise VideoError(f"{name}: is a container or script that is not read; convert it to mp4 or mkv") from error
    except PermissionError as error:
        raise VideoError(f"{name}: cannot be opened ({error.strerror})") from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{name}: not a readable video, truncated or damaged ({error.strerror})") from error
    try:
        return container, _video_stream(name, container, num_threads)
    except BaseException:
        container.close()
        raise


def _video_stream(name: str, container: Any, num_threads: int) -> Any:
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        kind = "only audio" if container.streams.audio else "nothing to see"
        raise VideoError(f"{name}: has no video stream, {kind}")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{name}: its video stream has a codec that this FFmpeg does not know")
    stream.thread_type = "AUTO" if num_threads != 1 else "NONE"
    stream.thread_count = num_threads
    return stream
