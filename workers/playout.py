"""When frames are played and how far generation may run ahead. Pure: times and frames are told to it.

Times are monotonic nanoseconds.
"""

from collections import deque

from configs.schema import OutputConfig, StreamConfig, VideoConfig

NS = 1_000_000_000
UNLIMITED = 2**31
FPS_WINDOW_S = 5.0
"""Length of the sliding window over which the rate is measured."""
LATENCY_MARGIN = 1.2


class PlayoutClock:
    """When the next frame is due. A frame that comes late is an underrun; what follows is due from then on.

    Attributes:
        underruns: how often playout stood still for want of a frame.
        underruns_after_first_second: those after the first second of video.
    """

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._origin_ns: int | None = None
        self._since_origin = 0
        self._played = 0
        self.underruns = 0
        self.underruns_after_first_second = 0

    @property
    def due_ns(self) -> int | None:
        """When the next frame is due; None before the first, which is due when it comes."""
        if self._origin_ns is None:
            return None
        return self._origin_ns + self._since_origin * NS // self._fps

    def play(self, now_ns: int) -> None:
        """A frame is played now, which is not before it is due."""
        due = self.due_ns
        if due is None:
            self._origin_ns = now_ns
        elif now_ns - due > NS // self._fps:
            self._count_underrun()
            self._origin_ns, self._since_origin = now_ns, 0
        self._since_origin += 1
        self._played += 1

    def _count_underrun(self) -> None:
        self.underruns += 1
        if self._played > self._fps:
            self.underruns_after_first_second += 1


class Rate:
    """Frames a second over the last seconds."""

    def __init__(self) -> None:
        self._times: deque[int] = deque()

    def add(self, now_ns: int) -> None:
        """A frame left playout."""
        self._times.append(now_ns)
        while now_ns - self._times[0] > FPS_WINDOW_S * NS:
            self._times.popleft()

    @property
    def fps(self) -> float:
        if len(self._times) < 2 or self._times[-1] == self._times[0]:
            return 0.0
        return (len(self._times) - 1) * NS / (self._times[-1] - self._times[0])


class CreditPolicy:
    """Up to which block generation may begin.

    Live: a block may begin when playout begins the one before the last that may, so about one block lies between; if
    the pipeline needs longer than that for a block, it may begin earlier by what is missing, at most one more block.
    Free: always. Serial: when the block before it has come out whole.
    """

    def __init__(self, output: OutputConfig, stream: StreamConfig, video: VideoConfig) -> None:
        self._pace = output.pace
        self._stream = stream
        self._block_ns = stream.frames_in(1) * NS // video.fps
        self._frame_ns = NS // video.fps
        self._granted_ns: dict[int, int] = {}
        self._latency_ns = 0
        self._credit = {"live": 1, "free": UNLIMITED, "serial": 0}[self._pace]
        self._done = -1

    @property
    def credit(self) -> int:
        """Blocks up to this one may begin."""
        return self._credit

    def arrived(self, block: int, last_frame: int, now_ns: int) -> None:
        """A piece of a block is here, up to and with this frame number."""
        if last_frame + 1 < self._stream.first_frame(block + 1):
            return
        self._done = max(self._done, block)
        granted = self._granted_ns.pop(block, None)
        if granted is not None:
            self._latency_ns = max(now_ns - granted, self._latency_ns * 3 // 4)
        if self._pace == "serial":
            self._credit = max(self._credit, self._done + 1)

    def playing(self, frame: int, now_ns: int) -> None:
        """Playout is at this frame."""
        if self._pace != "live":
            return
        block = self._stream.block_of_frame(frame)
        begun_ns = (frame - self._stream.first_frame(block)) * self._frame_ns
        missing = max(0, int(self._latency_ns * LATENCY_MARGIN) - self._block_ns)
        ahead = 2 if begun_ns >= self._block_ns - min(missing, self._block_ns) else 1
        credit = block + ahead
        if credit > self._credit:
            for granted in range(self._credit + 1, credit + 1):
                self._granted_ns[granted] = now_ns
            self._credit = credit
