"""System tests are left out unless asked for, and never quietly when they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def collect(**environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/system/test_hosts.py"]
    bare = {key: value for key, value in os.environ.items() if key != "SYSTEM"}
    return subprocess.run(argv, cwd=ROOT, env={**bare, **environment}, capture_output=True, text=True, timeout=60)


def test_without_system_they_are_deselected() -> None:
    done = collect()
    assert "deselected" in done.stdout
    assert "skipped" not in done.stdout


def test_system_without_its_programs_is_an_error_that_names_the_cure(tmp_path: Path) -> None:
    done = collect(SYSTEM="1", PATH=str(tmp_path))
    assert done.returncode == 4
    assert "make system-deps" in done.stderr or "root" in done.stderr
