"""Content copied while it arrives: the file is right whatever went wrong on the way, and one given up leaves nothing."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm import export as export_module
from swarm.errors import NoSpace, TargetError, TargetExists
from swarm.export import Export

PIECE = 64 * 1024
DATA = random.Random(0).randbytes(10 * PIECE - 5)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The byte ranges that were copied, in order."""
    ranges: list[tuple[int, int]] = []
    original = export_module._copy_data

    def copy(fd: int, out: int, begin: int, end: int) -> str:
        ranges.append((begin, end))
        return original(fd, out, begin, end)

    monkeypatch.setattr(export_module, "_copy_data", copy)
    monkeypatch.setattr(export_module, "_clone", lambda *_: False)
    return ranges


def begin(export: Export, store: Path, name: str = "task") -> None:
    export.arriving(os.open(store, os.O_RDONLY), name, len(DATA), PIECE)


def finish(export: Export, store: Path, name: str = "task") -> str:
    fd = os.open(store, os.O_RDONLY)
    try:
        return export.finish(fd, expect_length=len(DATA), name=name).method
    finally:
        os.close(fd)


def test_at_the_end_only_what_was_not_copied_before_is_copied(store: Path, out: Path, copied: list[tuple[int, int]]) -> None:
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(8, 10)
        export.verified(2, 5)
        assert copied == [(8 * PIECE, len(DATA)), (2 * PIECE, 5 * PIECE)]
        assert not (out / "file").exists()
        finish(export, store)
    assert copied[2:] == [(0, 2 * PIECE), (5 * PIECE, 8 * PIECE)]
    assert (out / "file").read_bytes() == DATA
    assert os.listdir(out) == ["file"]


def test_nothing_copied_before_something_was_lost_counts(store: Path, out: Path, copied: list[tuple[int, int]]) -> None:
    store.write_bytes(b"lies" * (len(DATA) // 4) + DATA[-3:])
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(0, 10)
        export.lost()
        store.write_bytes(DATA)
        export.verified(3, 4)
        finish(export, store)
    assert (out / "file").read_bytes() == DATA


def test_a_lie_does_not_show_through_a_hole(store: Path, out: Path, copied: list[tuple[int, int]]) -> None:
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(0, 10)
        export.lost()
        with store.open("wb") as file:
            file.truncate(len(DATA))
        finish(export, store)
    assert (out / "file").read_bytes() == bytes(len(DATA))


def test_what_arrived_of_an_older_version_is_no_part_of_the_newer_one(store: Path, out: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_bytes(bytes(reversed(DATA)))
    with Export(out / "file", overwrite=False) as export:
        begin(export, older, "older")
        export.verified(0, 10)
        finish(export, store, "newer")
    assert (out / "file").read_bytes() == DATA
    with Export(out / "again", overwrite=False) as export:
        begin(export, older, "older")
        export.verified(0, 10)
        begin(export, store, "newer")
        export.verified(1, 2)
        finish(export, store, "newer")
    assert (out / "again").read_bytes() == DATA
    assert sorted(os.listdir(out)) == ["again", "file"]


def test_where_blocks_can_be_shared_nothing_is_copied_before_the_end(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(fd: int, into: int) -> bool:
        os.ftruncate(into, 0)
        os.pwrite(into, os.pread(fd, len(DATA), 0), 0)
        return True

    monkeypatch.setattr(export_module, "_clone", clone)
    monkeypatch.setattr(export_module, "_copy_data", None)
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(0, 10)
        assert finish(export, store) == "reflink"
    assert (out / "file").read_bytes() == DATA


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_given_up_leaves_nothing(store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(0, 5)
        assert bool(os.listdir(out)) is not unnamed
    assert os.listdir(out) == []


def test_a_command_killed_in_the_middle_leaves_nothing(store: Path, out: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from swarm.export import Export\n"
        f"e = Export(Path(sys.argv[2]), overwrite=False)\n"
        f"e.arriving(os.open(sys.argv[1], os.O_RDONLY), 'task', {len(DATA)}, {PIECE}); e.verified(0, 5)\n"
        "print('copied', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, store, out / "file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"copied\n"
        process.send_signal(signal.SIGKILL)
    assert os.listdir(out) == []


def test_a_file_that_appeared_meanwhile_is_not_replaced(store: Path, out: Path) -> None:
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(0, 10)
        (out / "file").write_text("mine")
        with pytest.raises(TargetExists):
            finish(export, store)
    assert (out / "file").read_text() == "mine"
    with Export(out / "file", overwrite=True) as export:
        begin(export, store)
        finish(export, store)
    assert (out / "file").read_bytes() == DATA
    assert os.listdir(out) == ["file"]


def test_a_full_disk_is_said_while_the_content_arrives(
    store: Path, out: Path, copied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(NoSpace, match="nothing is downloaded again"):
            export.verified(0, 1)
    assert os.listdir(out) == []


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC, errno.EDQUOT])
def test_a_file_system_that_cannot_hold_so_large_a_file_is_said_at_once(
    store: Path, out: Path, copied: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def too_large(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "ftruncate", too_large)
    with Export(out / "file", overwrite=False) as export, pytest.raises((TargetError, NoSpace), match="file"):
        begin(export, store)
    assert os.listdir(out) == []


@pytest.mark.parametrize("step", ["arriving", "finish"])
def test_a_place_where_no_file_can_be_made_is_said_and_keeps_no_descriptor(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source, original = os.open(store, os.O_RDONLY), os.open

    def denied(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *arguments, **options)  # type: ignore[arg-type]

    with Export(out / "file", overwrite=False) as export:
        monkeypatch.setattr(os, "open", denied)
        steps = {
            "arriving": lambda: export.arriving(os.dup(source), "task", len(DATA), PIECE),
            "finish": lambda: export.finish(source, expect_length=len(DATA)),
        }
        with pytest.raises(TargetError, match="Permission denied"):
            steps[step]()
    os.close(source)


def test_piece_numbers_that_cannot_be_do_no_harm(store: Path, out: Path, copied: list[tuple[int, int]]) -> None:
    with Export(out / "file", overwrite=False) as export:
        begin(export, store)
        export.verified(-3, 1)
        export.verified(9, 1 << 40)
        export.verified(20, 30)
        finish(export, store)
    assert (out / "file").read_bytes() == DATA


def test_standard_output_gets_nothing_before_all_is_there(store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Export(Path("-"), overwrite=False) as export:
        begin(export, store)
        export.verified(0, 10)
    assert capfd.readouterr().out == ""
