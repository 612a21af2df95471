"""Content that is still arriving, as the command that will write it is told about it.

The command copies what is verified while the rest arrives: at the end only the last pieces are left to copy, where copying
a large file would take as long again as the download.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from swarm import pieces
from swarm.pieces import PieceSet
from swarm.task import Geometry, Task

MAX_RUNS: Final = 4096
"""Runs of pieces in one line; the others come with the next."""


class Arriving(Protocol):
    """The part of `edges.StoredTask` needed here."""

    @property
    def task(self) -> Task: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def held(self) -> PieceSet: ...
    def on_lost(self, callback: Any) -> None: ...
    def open_read_only(self, *, partial: bool = False) -> int: ...
    def close(self) -> None: ...


class Told:
    """What a command knows of one arriving content.

    Owns the handle: `close` when the fetch ended or another content takes its place.
    """

    def __init__(self, content: Arriving) -> None:
        self._content = content
        self._told = pieces.none(content.geometry.piece_count)
        self._lost = False
        content.on_lost(self._on_lost)

    def _on_lost(self, _lost: list[int]) -> None:
        self._lost = True

    def opening(self) -> tuple[dict[str, Any], int]:
        """The first line, and the descriptor that goes with it, which the caller closes.

        Raises:
            StoreError: No descriptor left.
        """
        geometry = self._content.geometry
        descriptor = self._content.open_read_only(partial=True)
        told = {"task": self._content.task.id.hex(), "length": geometry.length, "piece_length": geometry.piece_length}
        return {"arriving": told}, descriptor

    def losses(self) -> list[dict[str, Any]]:
        """A line if something told turned out to be wrong: the command starts over."""
        if not self._lost:
            return []
        self._lost = False
        self._told.setall(0)
        return [{"lost": True}]

    def news(self) -> list[dict[str, Any]]:
        """What changed since the last call."""
        lines = self.losses()
        fresh = self._content.held & ~self._told
        runs: list[tuple[int, int]] = []
        first = fresh.find(1)
        while first >= 0 and len(runs) < MAX_RUNS:
            stop = fresh.find(0, first)
            stop = len(fresh) if stop < 0 else stop
            runs.append((first, stop))
            self._told[first:stop] = True
            first = fresh.find(1, stop)
        return [*lines, {"verified": runs}] if runs else lines

    def close(self) -> None:
        self._content.close()
