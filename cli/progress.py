"""Progress of a fetch: a bar on a terminal, a line every few seconds elsewhere.  rich is imported at the first news, so a fetch
that is over at once never pays for it."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, Final

from swarm.quantities import human_size

LINE_SECONDS: Final = 5.0
RATE_WINDOW_SECONDS: Final = 5.0
PHASES: Final = {
    "resolving": "asking the origin",
    "finding": "finding holders",
    "fetching": "fetching",
    "checking": "checking the digest",
    "done": "done",
}


class Rate:
    """Bytes a second over the last few seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)

    def update(self, now: float, done: int) -> float:
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        return (done - before) / (now - then) if now > then else 0.0


def describe(news: dict[str, Any]) -> str:
    """Where the bytes come from, in a few words."""
    parts = [f"{news['peers']} peer{'' if news['peers'] == 1 else 's'}"]
    parts += [
        f"{human_size(news[key])} {word}" for key, word in (("from_peers", "peers"), ("from_origin", "origin")) if news[key]
    ]
    return ", ".join(parts)


class FetchProgress:
    """Shows what it is called with until the `with` block ends."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._bar: Any = None
        self._row: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> FetchProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, news: dict[str, Any]) -> None:
        now = time.monotonic()
        rate = self._rate.update(now, news["done"])
        if sys.stderr.isatty():
            self._show_bar(news, rate)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            whole = f" of {human_size(news['bytes'])}" if news["bytes"] is not None else ""
            phase = PHASES.get(news["phase"], news["phase"])
            done = f"{phase}: {human_size(news['done'])}{whole}, {human_size(rate)}/s"
            print(f"{done}, {describe(news)}", file=sys.stderr)

    def _show_bar(self, news: dict[str, Any], rate: float) -> None:
        if self._bar is None:
            self._start_bar()
        self._bar.update(
            self._row,
            total=news["bytes"],
            completed=news["done"],
            description=PHASES.get(news["phase"], news["phase"]),
            rate=f"{human_size(rate)}/s",
            sources=describe(news),
        )

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[sources]}"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
        )
        self._bar.start()
        self._row = self._bar.add_task("starting", total=None, rate="", sources="")
