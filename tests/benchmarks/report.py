"""What a benchmark found: figures, their limits, the machine, a table and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Limit:
    """A figure must not be above (or, with `at_least`, below) a value."""

    figure: str
    value: float
    at_least: bool = False

    def holds(self, figures: Mapping[str, float]) -> bool:
        measured = figures.get(self.figure)
        if measured is None:
            return False
        return measured >= self.value if self.at_least else measured <= self.value

    def __str__(self) -> str:
        return f"{self.figure} {'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        figures: Numbers by name; the unit is in the name (`seconds`, `_bytes`, `_s`), else they are ratios or counts.
        details: Whatever else may explain them, for the JSON.
    """

    figures: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """All runs of one case.

    Attributes:
        floor: Seconds that one copy needs over the origin's link; `None` where that means nothing.
        failure: Why it could not be measured, empty if it was.
    """

    case: str
    title: str
    limits: tuple[Limit, ...]
    floor: float | None
    runs: tuple[Run, ...]
    failure: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """The median of each figure that every run has."""
        if not self.runs:
            return {}
        shared = set.intersection(*(set(run.figures) for run in self.runs))
        return {name: statistics.median(run.figures[name] for run in self.runs) for name in sorted(shared)}

    @property
    def passed(self) -> bool:
        return not self.failure and all(limit.holds(self.figures) for limit in self.limits)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "changed_files": len(_output("git", "status", "--porcelain").splitlines()),
        "nginx": _output("nginx", "-v"),
        "curl": _output("curl", "--version").partition("\n")[0],
        "libtorrent": _output(sys.executable, "-c", "import libtorrent; print(libtorrent.__version__)"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return ""
    return (done.stdout or done.stderr).strip() if done.returncode == 0 else ""


def write(results: Sequence[Result], directory: Path, facts: Mapping[str, Any]) -> Path:
    """Write everything to a new file in `directory`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    shown = [{**asdict(it), "figures": it.figures, "passed": it.passed} for it in results]
    path.write_text(json.dumps({"machine": facts, "results": shown}, indent=1, default=str) + "\n")
    return path


def read(path: Path) -> list[Result]:
    """What `write` wrote."""
    raw = json.loads(path.read_text())
    return [
        Result(
            it["case"],
            it["title"],
            tuple(Limit(**limit) for limit in it["limits"]),
            it["floor"],
            tuple(Run(run["figures"], run["details"]) for run in it["runs"]),
            it["failure"],
        )
        for it in raw["results"]
    ]


HEADINGS = ("case", "copies", "last done s", "floor s", "ratio", "other figures", "limits", "")
_IN_COLUMNS = frozenset({"copies", "seconds"})


def row(result: Result) -> tuple[str, ...]:
    figures = result.figures
    seconds = figures.get("seconds")
    ratio = seconds / result.floor if seconds is not None and result.floor else None
    others = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name not in _IN_COLUMNS)
    verdict = "" if not result.limits and not result.failure else "pass" if result.passed else "FAIL"
    return (
        result.case,
        _number(figures.get("copies"), 3),
        _number(seconds, 2),
        _number(result.floor, 2),
        _number(ratio, 2),
        result.failure or others,
        ", ".join(map(str, result.limits)),
        verdict,
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(results: Sequence[Result]) -> str:
    """A Markdown table, as docs/reference/benchmarks.md has it."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(row, results)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)
