"""Benchmarks of single parts: modules of this package that run on their own and print one JSON object."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from tests.benchmarks.many import BenchmarkFailed
from tests.benchmarks.report import Run

PARTS: Final = ("transfer", "store", "origin", "dht")
TIMEOUT: Final = 300.0


def found() -> list[str]:
    return [name for name in PARTS if importlib.util.find_spec(f"tests.benchmarks.{name}") is not None]


def measure(name: str, seed: int) -> Run:
    """Run one in a process of its own, so that no part pays for another's memory."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.benchmarks.{name}"], capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkFailed(f"tests.benchmarks.{name} did not end in {TIMEOUT:.0f} s") from None
    if done.returncode:
        raise BenchmarkFailed(f"tests.benchmarks.{name}: {done.stderr.strip()[-500:]}")
    said = _objects(done.stdout)
    return Run(dict(_numbers("", said)), {"seed": seed, "printed": said})


def _objects(out: str) -> Any:
    """What was printed: one JSON value, or one per line."""
    try:
        return json.loads(out)
    except ValueError:
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in nested maps and lists, named by the way to it."""
    match value:
        case bool():
            return
        case int() | float():
            yield prefix or "value", float(value)
        case dict():
            for key, inner in value.items():
                yield from _numbers(f"{prefix}.{key}".lstrip("."), inner)
        case list():
            for number, inner in enumerate(value):
                yield from _numbers(f"{prefix}.{number}".lstrip("."), inner)
