"""Commands that start together, and what processes cost.

A command of a *start* stands ready behind a shell that waits for its standard input to close, then notes the time and
becomes the command.  Twenty are let go within a millisecond; how far apart they really began is measured, not assumed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
# Opening the stamp a second time truncates it: first "ready", then the time at which the command began.
_WAIT_THEN_BECOME: Final = 'printf "ready\\n" >"$0"; read -r; printf "%s\\n" "$EPOCHREALTIME" >"$0"; exec "$@" </dev/null'


class NotReady(Exception):
    """Something did not get ready, or did not end, in time; the message says what."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that ended, so far."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def resident(pid: int) -> tuple[int, int]:
    """Bytes resident now, and at most so far."""
    with open(f"/proc/{pid}/status") as file:
        shown = dict(line.split(":", 1) for line in file if line.startswith("Vm"))
    return tuple(int(shown[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]  # two


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command went.

    Attributes:
        began: Wall seconds at which the command took the place of the waiting shell.
        ended: Wall seconds at which it was seen to be gone.
        cpu: Seconds of its own processor time, user and system.
    """

    code: int
    began: float
    ended: float
    cpu: float
    out: str
    err: str

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Prepared:
    """A command that waits for `release`.  `work` gets its output files; `close` kills it."""

    def __init__(self, command: Sequence[str], work: Path, name: str, *, environment: Mapping[str, str] | None = None) -> None:
        self._stamp, self._out, self._err = (work / f"{name}.{kind}" for kind in ("stamp", "out", "err"))
        shell = ["bash", "-c", _WAIT_THEN_BECOME, str(self._stamp), *command]
        self._stamp.unlink(missing_ok=True)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment)
        self.ended: Ended | None = None

    @property
    def ready(self) -> bool:
        return self._stamp.exists() and self._stamp.read_bytes().endswith(b"\n")

    @property
    def running(self) -> bool:
        return self.ended is None

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def collect(self) -> Ended | None:
        """Take in the end of the command if it has ended; never blocks."""
        if self.ended is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.ended = self._ended(time.time(), usage.ru_utime + usage.ru_stime)
        return self.ended

    def _ended(self, now: float, cpu: float) -> Ended:
        stamp = self._stamp.read_text().strip() if self._stamp.exists() else ""
        began = float(stamp) if stamp and stamp != "ready" else now
        out, err = (path.read_text(errors="replace") for path in (self._out, self._err))
        return Ended(self.process.returncode, began, now, cpu, out, err)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        if self.ended is None:
            os.kill(self.process.pid, signal_number)

    def close(self) -> None:
        """Kill it if it runs and wait for its end."""
        self.kill()
        wait([self], 10)


def prepare(commands: Sequence[Prepared], timeout: float = 20) -> None:
    """Wait until every shell stands ready.

    Raises:
        NotReady: One did not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not all(it.ready for it in commands):
        if time.monotonic() > deadline:
            raise NotReady("the shells that wait to become commands did not start")
        time.sleep(0.01)


def wait(commands: Sequence[Prepared], timeout: float, *, on_tick: Callable[[], None] = lambda: None) -> list[Ended]:
    """Wait until all have ended; the ends are seen as they come, through pidfds.

    Args:
        on_tick: Called at least every 0.25 s meanwhile.

    Raises:
        NotReady: Some still run after `timeout` seconds; they go on running.
    """
    deadline = time.monotonic() + timeout
    poll, open_pidfds = select.poll(), []
    try:
        for it in commands:
            if it.collect() is None:
                open_pidfds.append(os.pidfd_open(it.process.pid))
                poll.register(open_pidfds[-1], select.POLLIN)
        while not all(it.collect() for it in commands):
            if time.monotonic() > deadline:
                running = sum(it.running for it in commands)
                raise NotReady(f"{running} of {len(commands)} commands still ran after {timeout:.0f} s")
            for descriptor, _ in poll.poll(250):
                poll.unregister(descriptor)
            on_tick()
    finally:
        for descriptor in open_pidfds:
            os.close(descriptor)
    return [it.ended for it in commands if it.ended is not None]


def start_together(commands: Sequence[Prepared]) -> None:
    """Let all of them go at once."""
    prepare(commands)
    for it in commands:
        it.release()


def spread(ends: Sequence[Ended]) -> float:
    """Seconds between the first and the last beginning."""
    return max(it.began for it in ends) - min(it.began for it in ends)


def last_done(ends: Sequence[Ended]) -> float:
    """Seconds from the first beginning to the last end."""
    return max(it.ended for it in ends) - min(it.began for it in ends)
