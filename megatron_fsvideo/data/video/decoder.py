"""Decoded frames of a video file in the order in which a player shows them.

A packet that does not decode costs its own frames and no others. Frames outside the file's edit list, and leading
pictures whose references are missing, are dropped by FFmpeg's decoders, as in players.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from megatron_fsvideo.data.video.container import VideoError, open_video, shown_name

MAX_PIXELS = 1 << 26
"""Largest number of pixels of a frame: twice 8K. More is a damaged header, or a file made to exhaust memory."""


class Decoder:
    """An open file, decoded from its first frame on, or from the keyframe that `seek` finds.

    Args:
        num_threads: 0 lets FFmpeg choose. With one, a packet's error cannot cost the frames of others, and what a
            damaged file shows is the same each time.

    Attributes:
        stream: PyAV's video stream.
        num_read: packets so far.
        num_packets: of those, the ones that should have become frames: not outside an edit list.
        num_failed: of those, packets that the decoder refused.
        broke_off: why reading the file ended before its end, if it did.
    """

    def __init__(self, path: str | Path, num_threads: int = 0) -> None:
        self.path = path
        self.container, self.stream = open_video(path, num_threads)
        self.num_read = self.num_packets = self.num_failed = 0
        self.broke_off: str | None = None
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def seek(self, timestamp: int) -> None:
        """Go to the keyframe at or before a timestamp of the stream; call it before the first of `frames`.

        Raises:
            av.FFmpegError: the container cannot.
        """
        self.container.seek(timestamp, stream=self.stream, backward=True)

    def frames(self) -> Iterator[Any]:
        """PyAV's frames.

        Raises:
            VideoError: the frames change their size, or are too large.
        """
        for packet in self._packets():
            try:
                decoded = self.stream.decode(packet)
            except (av.FFmpegError, ValueError):
                self.num_failed += packet is not None and packet.size > 0
                continue
            for frame in decoded:
                self._check_size(frame)
                yield frame

    def _packets(self) -> Iterator[Any]:
        """The file's packets; the last is empty and makes the decoder give what it holds back."""
        try:
            for packet in self.container.demux(self.stream):
                self.num_read += packet.size > 0
                self.num_packets += packet.size > 0 and not packet.is_discard
                yield packet
            return
        except (av.FFmpegError, OSError) as error:
            self.broke_off = error.strerror or type(error).__name__
        yield None

    def _check_size(self, frame: Any) -> None:
        size = frame.height, frame.width
        if self._size is None:
            self._size = size
            if size[0] * size[1] > MAX_PIXELS:
                raise VideoError(f"{shown_name(self.path)}: frames of {size[1]}x{size[0]} pixels are too large")
        if size != self._size:
            raise VideoError(
                f"{shown_name(self.path)}: changes its resolution from {self._size[1]}x{self._size[0]} to "
                f"{size[1]}x{size[0]}; cut it there"
            )
