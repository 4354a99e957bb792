"""Times at which a video file's frames are shown, and the frames that make a clip of a given rate."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timeline:
    """The frames of a file in time.

    Attributes:
        num_frames: of the file.
        fps: frames per second in the mean.
        seconds: when each frame is shown, of a file with variable frame rate; None: evenly.
    """

    num_frames: int
    fps: float
    seconds: tuple[float, ...] | None = None

    def clip_indices(self, start: int, num_frames: int | None, fps: float) -> list[int]:
        """Source frame of each clip frame: the nearest to start, start + 1/fps, ... seconds; None takes all there are.

        Indices may lie beyond the file's end, if the clip does.
        """
        if num_frames is None:
            num_frames = self.fitting(start, self.num_frames, fps)
        return [self._nearest(start, k, fps) for k in range(num_frames)]

    def fitting(self, start: int, end: int, fps: float) -> int:
        """Number of clip frames that the source frames start, ..., end - 1 give."""
        if not start < end:
            return 0
        count = int((self._time(end - 1) - self._time(start)) * fps) + 2
        while count > 0 and self._nearest(start, count - 1, fps) >= end:
            count -= 1
        return count

    def _time(self, index: int) -> float:
        return index / self.fps if self.seconds is None else self.seconds[index]

    def _nearest(self, start: int, count: int, fps: float) -> int:
        if self.seconds is None:
            return start + int(count * (self.fps / fps) + 0.5)
        if not 0 <= start < self.num_frames:
            return start
        wanted = self.seconds[start] + count / fps
        after = bisect_left(self.seconds, wanted)
        if after == self.num_frames:
            # The last frame is shown for as long as a frame is in the mean.
            return after - 1 + int((wanted - self.seconds[-1]) * self.fps + 0.5)
        earlier = after - 1
        return after if after == 0 or 2 * wanted >= self.seconds[earlier] + self.seconds[after] else earlier


def make_timeline(seconds: Sequence[float] | None, num_frames: int, fps: float) -> Timeline:
    """The timeline of frames shown at these times, in order (None: not known), where the container says `fps`.

    The rate is variable if counting frames, at this rate or the one that the times have in the mean, would miss some
    frame by half an interval: containers round times, by up to a millisecond, and that is no variable rate.
    """
    if seconds is None or num_frames < 2:
        return Timeline(num_frames, fps)
    mean = (num_frames - 1) / (seconds[-1] - seconds[0])
    for rate in (fps, mean):
        if all(abs((time - seconds[0]) * rate - index) < 0.5 for index, time in enumerate(seconds)):
            return Timeline(num_frames, rate)
    return Timeline(num_frames, mean, tuple(seconds))
