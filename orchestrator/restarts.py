"""When a dead worker may be started again: with a growing pause, and not for ever. Pure; times are given to it."""

from collections import defaultdict, deque

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
MOST_FAILURES = 5
WITHIN_S = 120.0
NS = 1_000_000_000


class RestartBudget:
    """Counts deaths of each worker and plans restarts."""

    def __init__(self) -> None:
        self._deaths: defaultdict[str, deque[int]] = defaultdict(deque)
        self._planned: dict[str, int] = {}

    def ask(self, name: str, now_ns: int, counts: bool = True) -> int | None:
        """Plans a restart after a death: the pause in nanoseconds, None after too many deaths in a short time.

        One that another worker caused does not count.
        """
        if not counts:
            self._planned[name] = now_ns + int(FIRST_PAUSE_S * NS)
            return int(FIRST_PAUSE_S * NS)
        deaths = self._deaths[name]
        deaths.append(now_ns)
        while now_ns - deaths[0] > WITHIN_S * NS:
            deaths.popleft()
        if len(deaths) >= MOST_FAILURES:
            return None
        pause = int(min(FIRST_PAUSE_S * 2 ** (len(deaths) - 1), LONGEST_PAUSE_S) * NS)
        self._planned[name] = now_ns + pause
        return pause

    def due(self, now_ns: int) -> list[str]:
        """Workers whose pause is over; each is told once."""
        due = [name for name, at in self._planned.items() if at <= now_ns]
        for name in due:
            del self._planned[name]
        return due
