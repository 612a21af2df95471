"""Run the swarm's trio code under a virtual clock, as a pure function of a seed.

trio shuffles the tasks that are ready at one moment; with its generator seeded and its order made deterministic (as
Hypothesis does for its own trio support) a run can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar
from unittest import mock

import trio
import trio.testing
from trio._core import _run

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run `main` with a clock that jumps to the next deadline whenever nothing else is to be done."""
    with (
        mock.patch.object(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(_run, "_r", Random(seed)),
    ):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
