"""Two hundred nodes at once, with the real DHT: one copy, little more than the floor, and the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_two_hundred_nodes_read_one_copy_end_near_the_floor_and_do_the_same_each_time() -> None:
    # Two processes, so that two cores share the work, and hash seeds differ as between any two starts of Python.
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulations.two_hundred", "1"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in runs)
    assert [process.returncode for process in runs] == [0, 0]
    shown = json.loads(first)
    assert (shown["finished"], shown["unfinished"], shown["errors"]) == (200, 0, [])
    assert shown["copies"] <= 1.05
    assert shown["p99"] <= 1.4
    assert second == first
