"""kill -9 of a process that writes to the store, at random points."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tests.integration.store_writer import PIECES, material
from tests.store.material import disk_store, opened

KILLS = 40


@dataclass
class Run:
    """What one child said before it was killed."""

    pieces: list[int] = field(default_factory=list)
    complete: bool = False


class Writer:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.input: IO[str] = process.stdin
        self.output: IO[str] = process.stdout

    def run(self, path: Path, pause: float, kill_after: int) -> Run:
        """Let a child write; kill it when it has said `kill_after` things, or not at all if it ends before."""
        self.input.write(f"{path} {pause}\n")
        self.input.flush()
        found, pid = Run(), 0
        for said, line in enumerate(self.output, 1):
            match line.split():
                case ["pid", number]:
                    pid = int(number)
                case ["piece", number]:
                    found.pieces.append(int(number))
                case ["complete"]:
                    found.complete = True
                case ["ended"]:
                    break
            if pid and said >= kill_after:
                os.kill(pid, signal.SIGKILL)
                kill_after = 1 << 30
        return found


@pytest.fixture
def writer() -> Iterator[Writer]:
    command = [sys.executable, "-m", "tests.integration.store_writer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Writer(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def check_held(path: Path) -> set[int]:
    """What is held after a kill; every piece of it is right."""
    content = material()
    with disk_store(path) as store:
        if not store.entries():
            return set()
        with opened(store, content.blob.id) as task:
            held = set(task.held.search(1))
            for piece in held:
                part = task.slice(piece, 0, content.geometry.size(piece))
                assert part is not None
                assert os.pread(part.fd, part.length, part.offset) == content.piece(piece)
                part.release()
            return held


def kill_again_and_again(writer: Writer, directory: Path, kills: int, pause: float, most: int, seed: int) -> tuple[int, int]:
    """Kill `kills` children, each after some pieces; return held pieces written again, and the most one kill lost."""
    rng = random.Random(seed)
    path, generation = directory / "0", 0
    again = worst = 0
    verified: set[int] = set()
    for _ in range(kills):
        run = writer.run(path, pause, rng.randint(1, most))
        again += len(verified.intersection(run.pieces))
        verified.update(run.pieces)
        held = check_held(path)
        worst = max(worst, len(verified - held))
        if run.complete:
            assert held == set(range(PIECES))
            generation += 1
            path, verified = directory / str(generation), set()
        else:
            verified &= held
    return again, worst


def test_verified_pieces_survive_kill_9_but_for_those_of_the_last_batch(writer: Writer, tmp_path: Path) -> None:
    again, worst = kill_again_and_again(writer, tmp_path, KILLS, pause=0.0005, most=90, seed=1)
    assert again == 0, "what is held after the kill is never fetched again"
    assert worst <= 64


def test_at_the_pace_of_a_real_download_at_most_four_pieces_are_fetched_again(writer: Writer, tmp_path: Path) -> None:
    """16 KiB every 10 ms stands for 512 KiB pieces at 400 Mbit/s."""
    again, worst = kill_again_and_again(writer, tmp_path, 10, pause=0.01, most=20, seed=2)
    assert again == 0
    assert worst <= 4


def test_a_process_killed_over_and_over_finishes_in_the_end(writer: Writer, tmp_path: Path) -> None:
    rng = random.Random(3)
    written = 0
    for _ in range(30):
        run = writer.run(tmp_path / "store", 0.0, rng.randint(20, 60))
        written += len(run.pieces)
        if run.complete:
            break
    else:
        run = writer.run(tmp_path / "store", 0.0, 1 << 30)
        written += len(run.pieces)
    assert run.complete
    assert check_held(tmp_path / "store") == set(range(PIECES))
    with disk_store(tmp_path / "store") as store:
        assert store.entries()[0].complete
