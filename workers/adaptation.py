"""When the denoiser changes its preset: block times in, changes out. Pure: no clock, no tensor, no message.

Knows presets as names in an order, from the best picture to the fastest; what they are is not its matter.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from configs.schema import AdaptiveConfig


@dataclass(frozen=True)
class Change:
    """From one preset to the next; `measured` and `target` are in `unit`: rtf, or p99_ms."""

    old: str
    new: str
    unit: str
    measured: float
    target: float
    reason: str


class Adaptation:
    """Which preset is in force, and what the last blocks say of it.

    The better preset is expected to be slower by what was seen when it was last left: the median of the blocks that
    missed the target over that of the first ones after it. So a load that stays never brings it back, one that goes
    away does, and a single slow block says nothing of how slow a preset is.

    Args:
        block_s: seconds of video in a block.
        preset: the one in force at first.

    Attributes:
        preset: the one that shall be in force from the next block on.
    """

    def __init__(self, config: AdaptiveConfig, block_s: float, preset: str) -> None:
        self._config, self._block_s = config, block_s
        rtf = config.target_rtf
        self._limit_ms = 1000 * block_s / rtf if rtf is not None else config.target_p99_ms or math.inf
        self._times: deque[float] = deque(maxlen=config.window)
        self._slower_by = dict.fromkeys(config.presets, 1.0)
        self._wait = config.wait
        self._since = 0
        self._left: tuple[str, float] | None = None
        self._returned = False
        self._is_first = True
        self.preset = preset

    def begin_at(self, preset: str) -> None:
        """Goes on at a preset of which nothing was measured yet."""
        self.preset, self._since, self._is_first = preset, 0, True
        self._times.clear()

    def note(self, block_ms: float) -> Change | None:
        """Takes in a block's time, waits and recaches not included; the first at a preset does not count.

        Returns:
            The change that it calls for, from the next block on.
        """
        if self._is_first:
            self._is_first = False
            return None
        self._since += 1
        self._times.append(block_ms)
        if len(self._times) < self._config.window:
            return None
        measured = self._measured_ms()
        if self._left is not None:
            preset, usual = self._left
            self._slower_by[preset], self._left = max(1.0, usual / median(self._times)), None
        if measured > self._limit_ms:
            return self._faster(measured)
        return self._better(measured)

    def _measured_ms(self) -> float:
        """The mean, or the 99th percentile by nearest rank: of fewer than 100 blocks that is the slowest."""
        if self._config.target_rtf is not None:
            return sum(self._times) / len(self._times)
        return sorted(self._times)[math.ceil(0.99 * len(self._times)) - 1]

    def _faster(self, measured: float) -> Change | None:
        presets = self._config.presets
        new = presets.index(self.preset) + 1
        if new == len(presets):
            return None
        failed = self._returned and self._since < self._wait + self._config.window
        self._wait = min(2 * self._wait, self._config.longest_wait) if failed else self._config.wait
        self._left = self.preset, median(self._times)
        return self._change(presets[new], measured, "misses")

    def _better(self, measured: float) -> Change | None:
        place = self._config.presets.index(self.preset)
        if place == 0 or self._since < self._wait:
            return None
        new = self._config.presets[place - 1]
        known = self._since < self._config.longest_wait
        expected = measured * (self._slower_by[new] if known else 1.0)
        if expected > self._config.headroom * self._limit_ms:
            return None
        return self._change(new, measured, "leaves room for")

    def _change(self, new: str, measured_ms: float, verdict: str) -> Change:
        old, config = self.preset, self._config
        self.begin_at(new)
        self._returned = config.presets.index(new) < config.presets.index(old)
        blocks = f"over {config.window} blocks {verdict} the target"
        if config.target_rtf is not None:
            rtf = 1000 * self._block_s / measured_ms
            return Change(old, new, "rtf", rtf, config.target_rtf, f"RTF {rtf:.2f} {blocks} {config.target_rtf:g}")
        reason = f"p99 {measured_ms:.0f} ms {blocks} {self._limit_ms:g} ms"
        return Change(old, new, "p99_ms", measured_ms, self._limit_ms, reason)
