"""The README's session and the tutorial, typed as written."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Step, shape, steps

PORT = re.compile(r"(?<=[ :])(8000|74\d\d)\b")
READY = re.compile(rb"\bready\b|Serving HTTP")
END = "@@end "


class Terminal:
    """A shell that keeps its variables, and the programs it was told to run beside."""

    def __init__(self, directory: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment |= {
            "XDG_STATE_HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory),
            "PYTHONUNBUFFERED": "1",
            "SWARM_DEBUG": "1",
        }
        self.directory = directory
        self.environment = environment
        self.ports: dict[str, str] = {}
        self.beside: list[subprocess.Popen[bytes]] = []
        self.shell = subprocess.Popen(
            ["bash", "--norc"], cwd=directory, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def type(self, command: str) -> tuple[list[str], int]:
        """What it prints, and how it ends."""
        if command.startswith(". .venv/"):
            return [], 0  # the test's own environment stands for it
        command = PORT.sub(self._port, command)
        if command.endswith(" &"):
            self._run_beside(command.removesuffix(" &"))
            return [], 0
        if command.startswith("kill "):
            return [], max(self._end(int(number)) for number in re.findall(r"%(\d+)", command))
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"{command}\nended=$?; echo; echo '{END}'$ended\n")
        self.shell.stdin.flush()
        printed: list[str] = []
        for line in self.shell.stdout:
            if line.startswith(END):
                return [text for text in printed if text], int(line.removeprefix(END))
            printed.append(line.rstrip("\n"))
        raise AssertionError(f"the shell ended at: {command}")

    def _port(self, match: re.Match[str]) -> str:
        """Free ports for those that a person would use; neighbours stay neighbours."""
        name = match[1]
        if name not in self.ports:
            base = _free_pair()
            self.ports[name], self.ports[str(int(name) + 1)] = str(base), str(base + 1)
        return self.ports[name]

    def _run_beside(self, command: str) -> None:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.directory, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.beside.append(process)
        assert process.stdout is not None
        said = b""
        for line in process.stdout:
            said += line
            if READY.search(line):
                return
        raise AssertionError(f"{command}: {said.decode()}")

    def _end(self, number: int) -> int:
        process = self.beside[number - 1]
        process.terminate()
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGTERM), said.decode()
        return 0

    def close(self) -> None:
        for process in self.beside:
            if process.returncode is None:
                process.kill()
                process.communicate()
        self.shell.kill()
        self.shell.wait()
        for stream in (self.shell.stdin, self.shell.stdout):
            assert stream is not None
            stream.close()


def _free_pair() -> int:
    """A port that is free, as is the next one, for UDP and TCP."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        kinds = ((socket.SOCK_STREAM, port), (socket.SOCK_DGRAM, port), (socket.SOCK_STREAM, port + 1))
        try:
            for kind, number in kinds:
                with socket.socket(type=kind) as probe:
                    probe.bind(("127.0.0.1", number))
        except (OSError, OverflowError):
            continue
        return port


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial/first-swarm.md"])
def test_a_session_typed_as_written_prints_what_the_page_says(page: str, tmp_path: Path) -> None:
    session = list(steps((ROOT / page).read_text()))
    assert any("swarm fetch" in step.command for step in session)
    terminal = Terminal(tmp_path)
    try:
        for step in session:
            _check(step, *terminal.type(step.command))
    finally:
        terminal.close()


def _check(step: Step, printed: list[str], code: int) -> None:
    assert shape(printed) == shape(step.expected), step.command
    assert (code != 0) == any(line.startswith("swarm: ") for line in step.expected), (step.command, code, printed)
