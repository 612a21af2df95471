"""The output file: whole or not at all, and nowhere else than where it was asked for."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm import export as export_module
from swarm.errors import Interrupted, NoSpace, StoreError, TargetError, TargetExists
from swarm.export import ExportResult, check_target, export

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A read-only descriptor, as the daemon hands out."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "content").write_bytes(DATA)
    fd = os.open(tmp_path / "store" / "content", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def put(source: int, target: Path, *, overwrite: bool = False, **options: Any) -> ExportResult:
    return export(source, target, overwrite=overwrite, expect_length=len(DATA), **options)


def fails_with(code: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


# --- what arrives -------------------------------------------------------------------------------------------------


def test_the_file_arrives_whole_with_the_mode_the_umask_says(source: int, out: Path) -> None:
    old = os.umask(0o027)
    try:
        put(source, out / "file")
    finally:
        os.umask(old)
    assert (out / "file").read_bytes() == DATA
    assert (out / "file").stat().st_mode & 0o777 == 0o640
    assert names(out) == ["file"]


@pytest.mark.parametrize("refused", [0, 1, 2, 3])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_every_way_of_copying_gives_the_same_bytes(
    source: int, out: Path, monkeypatch: pytest.MonkeyPatch, refused: int, code: int
) -> None:
    if refused >= 1:
        monkeypatch.setattr(fcntl, "ioctl", fails_with(code))
    if refused >= 2:
        monkeypatch.setattr(os, "copy_file_range", fails_with(code))
    if refused >= 3:
        monkeypatch.setattr(os, "sendfile", fails_with(code))
    method = put(source, out / "file").method
    assert method in [("reflink", "copy_file_range"), ("copy_file_range",), ("sendfile",), ("copy",)][refused]
    assert (out / "file").read_bytes() == DATA


def test_a_kernel_that_copies_nothing_and_says_so_is_not_believed(
    source: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    assert put(source, out / "file").method == "sendfile"
    assert (out / "file").read_bytes() == DATA


def test_a_reflink_is_taken_where_there_is_one(source: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(to: int, request: int, fd: int) -> int:
        assert request == 0x40049409
        return os.pwrite(to, os.pread(fd, len(DATA), 0), 0) * 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert put(source, out / "file") == ExportResult("reflink")
    assert (out / "file").read_bytes() == DATA


@pytest.mark.parametrize("length", [0, 1, 4096])
def test_small_and_empty_content_arrives(tmp_path: Path, out: Path, length: int) -> None:
    (tmp_path / "content").write_bytes(DATA[:length])
    with (tmp_path / "content").open("rb") as file:
        export(file.fileno(), out / "file", overwrite=False, expect_length=length)
    assert (out / "file").read_bytes() == DATA[:length]


def test_holes_stay_holes(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    length = 20 << 30
    with (tmp_path / "content").open("w+b") as file:
        for offset in (0, 10 << 30, length - 5):
            os.pwrite(file.fileno(), b"bytes", offset)
        os.truncate(file.fileno(), length)
        export(file.fileno(), out / "file", overwrite=False, expect_length=length)
    found = (out / "file").stat()
    assert (found.st_size, found.st_blocks * 512 < 1 << 20) == (length, True)
    with (out / "file").open("rb") as copy:
        assert [os.pread(copy.fileno(), 6, offset) for offset in (0, 10 << 30, length - 5)] == [
            b"bytes\0",
            b"bytes\0",
            b"bytes",
        ]


def test_content_that_ends_in_a_hole_has_its_full_length(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    with (tmp_path / "content").open("w+b") as file:
        file.write(b"x")
        file.truncate(1 << 20)
        export(file.fileno(), out / "file", overwrite=False, expect_length=1 << 20)
    assert (out / "file").read_bytes() == b"x" + bytes((1 << 20) - 1)


def test_a_store_that_gives_too_little_is_noticed(source: int, out: Path) -> None:
    with pytest.raises(StoreError, match="expected"):
        export(source, out / "file", overwrite=False, expect_length=len(DATA) + 1)
    assert names(out) == []


def test_a_store_file_cut_while_it_is_copied_leaves_nothing(
    source: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(export_module, "KERNEL_CHUNK_BYTES", 1 << 20)
    original = os.copy_file_range

    def copy(*arguments: Any) -> int:
        os.truncate(tmp_path / "store" / "content", 1000)
        return original(*arguments)

    monkeypatch.setattr(os, "copy_file_range", copy)
    with pytest.raises(StoreError, match="shorter"):
        put(source, out / "file")
    assert names(out) == []


# --- hard links ---------------------------------------------------------------------------------------------------


def test_a_hard_link_is_the_same_file_and_read_only(source: int, tmp_path: Path, out: Path) -> None:
    content = tmp_path / "store" / "content"
    assert put(source, out / "file", hard_link_from=content) == ExportResult("hard link")
    assert (out / "file").samefile(content)
    assert (out / "file").stat().st_mode & 0o777 & 0o222 == 0
    assert names(out) == ["file"]


def test_a_hard_link_over_itself_leaves_no_temporary_name(source: int, tmp_path: Path, out: Path) -> None:
    content = tmp_path / "store" / "content"
    put(source, out / "file", hard_link_from=content)
    put(source, out / "file", hard_link_from=content, overwrite=True)
    assert names(out) == ["file"]
    assert content.stat().st_nlink == 2


def test_a_path_that_leads_to_other_bytes_than_the_descriptor_is_not_linked(source: int, tmp_path: Path, out: Path) -> None:
    (tmp_path / "swapped").write_bytes(b"evil")
    assert put(source, out / "file", hard_link_from=tmp_path / "swapped").method != "hard link"
    assert (out / "file").read_bytes() == DATA
    assert names(out) == ["file"]


def test_where_no_hard_link_is_possible_it_copies(
    source: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.link

    def link(source: Any, target: Any, **options: Any) -> None:
        if str(source).endswith("content"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        original(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    assert put(source, out / "file", hard_link_from=tmp_path / "store" / "content").method != "hard link"
    assert (out / "file").read_bytes() == DATA


# --- what is in the way -------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_unless_told_otherwise(source: int, out: Path) -> None:
    (out / "file").write_text("mine")
    for attempt in (lambda: check_target(out / "file", overwrite=False), lambda: put(source, out / "file")):
        with pytest.raises(TargetExists, match="--overwrite"):
            attempt()
    assert (out / "file").read_text() == "mine"
    check_target(out / "file", overwrite=True)
    put(source, out / "file", overwrite=True)
    assert (out / "file").read_bytes() == DATA
    assert names(out) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_we_copy_is_not_replaced(
    source: int, out: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    original = export_module._copy

    def copy(*arguments: Any) -> str:
        if not (out / "file").exists():
            (out / "file").write_text("mine")
        return original(*arguments)

    monkeypatch.setattr(export_module, "_copy", copy)
    if not links:
        monkeypatch.setattr(os, "link", fails_with(errno.EPERM))
    with pytest.raises(TargetExists):
        put(source, out / "file")
    assert (out / "file").read_text() == "mine"
    assert names(out) == ["file"]


def test_a_file_system_without_hard_links_will_do(source: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fails_with(errno.EPERM))
    put(source, out / "file")
    assert (out / "file").read_bytes() == DATA


def test_a_directory_or_a_device_is_no_target(source: int, out: Path) -> None:
    (out / "folder").mkdir()
    os.mkfifo(out / "pipe")
    for name, message in [
        ("folder", "is a directory"),
        ("pipe", "not a plain file"),
        (".", "directory"),
        ("..", "names no file"),
    ]:
        for overwrite in (True, False):
            with pytest.raises(TargetError, match=message):
                check_target(out / name, overwrite=overwrite)
            with pytest.raises(TargetError, match=message):
                put(source, out / name, overwrite=overwrite)
    assert names(out) == ["folder", "pipe"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_at_the_target_is_not_followed(source: int, tmp_path: Path, out: Path, overwrite: bool) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (out / "file").symlink_to(victim)
    (out / "nowhere").symlink_to(tmp_path / "new")
    for name in ("file", "nowhere"):
        with pytest.raises(TargetError, match="symbolic link"):
            check_target(out / name, overwrite=overwrite)
        with pytest.raises(TargetError, match="symbolic link"):
            put(source, out / name, overwrite=overwrite)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_swapped_in_half_way_is_not_followed(
    source: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    original = export_module._copy

    def copy(*arguments: Any) -> str:
        (out / "file").symlink_to(victim)
        return original(*arguments)

    monkeypatch.setattr(export_module, "_copy", copy)
    if overwrite:
        put(source, out / "file", overwrite=True)
        assert not (out / "file").is_symlink()
    else:
        with pytest.raises(TargetExists):
            put(source, out / "file")
    assert victim.read_text() == "precious"


def test_a_directory_swapped_for_a_link_half_way_does_not_lead_elsewhere(
    source: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    original = export_module._copy

    def copy(*arguments: Any) -> str:
        out.rename(tmp_path / "moved")
        out.symlink_to(tmp_path / "elsewhere")
        return original(*arguments)

    monkeypatch.setattr(export_module, "_copy", copy)
    put(source, out / "file")
    assert names(tmp_path / "elsewhere") == []
    assert (tmp_path / "moved" / "file").read_bytes() == DATA


def test_a_link_planted_under_the_temporary_name_is_not_written_through(
    source: int, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(os, "urandom", bytes)
    (out / f".file.{bytes(6).hex()}.part").symlink_to(victim)
    (out / "file").write_text("mine")
    with pytest.raises(TargetError, match="File exists"):
        put(source, out / "file", overwrite=True)
    assert victim.read_text() == "precious"
    assert (out / "file").read_text() == "mine"


def test_somebody_who_swaps_the_target_all_the_time_gets_nothing_written_through(tmp_path: Path, out: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "content").write_bytes(b"content")
    done = threading.Event()

    def swap() -> None:
        link, plain = out / "link", out / "plain"
        while not done.is_set():
            link.symlink_to(victim)
            link.replace(out / "file")
            plain.write_text("plain")
            plain.replace(out / "file")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with (tmp_path / "content").open("rb") as file:
            for turn in range(300):
                try:
                    export(file.fileno(), out / "file", overwrite=bool(turn % 2), expect_length=7)
                except TargetError:
                    continue
    finally:
        done.set()
        swapper.join()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "message"),
    [("a\0b", "null"), ("x" * 300, "too long"), ("missing/file", "make it first"), ("plain/file", "cannot write")],
)
def test_an_impossible_name_is_said_in_one_line(source: int, out: Path, name: str, message: str) -> None:
    (out / "plain").write_text("")
    for attempt in (lambda: check_target(out / name, overwrite=True), lambda: put(source, out / name)):
        with pytest.raises(TargetError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["CON", "‮gnp.exe", "a b", "-rf", "\n", "x" * 255, "…"])
def test_an_unusual_name_is_just_a_name(source: int, out: Path, name: str) -> None:
    put(source, out / name)
    assert names(out) == [name]


def test_no_permission_is_said_before_and_after(source: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(TargetError, match="permission denied"):
        check_target(out / "file", overwrite=False)
    original = os.open

    def denied(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(TargetError, match="Permission denied"):
        put(source, out / "file")


# --- what interrupts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["copy_file_range", "fsync", "link"])
def test_a_full_disk_leaves_no_half_file(
    source: int, out: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, where, fails_with(code))
    with pytest.raises(NoSpace, match="no space left") as caught:
        put(source, out / "file")
    assert caught.value.exit_code == 5
    assert names(out) == []


def test_an_error_of_the_disk_is_not_taken_for_a_missing_feature(
    source: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "copy_file_range", fails_with(errno.EIO))
    with pytest.raises(TargetError, match="Input/output"):
        put(source, out / "file")
    assert names(out) == []


def test_ctrl_c_leaves_no_half_file(source: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "file").write_text("mine")
    monkeypatch.setattr(fcntl, "ioctl", fails_with(errno.EOPNOTSUPP))

    def interrupted(*_: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(os, "copy_file_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(source, out / "file", overwrite=True)
    assert (out / "file").read_text() == "mine"
    assert names(out) == ["file"]


def test_the_name_appears_only_after_the_bytes_were_synced(source: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    original = os.fsync

    def fsync(fd: int) -> None:
        steps.append("directory" if os.readlink(f"/proc/self/fd/{fd}") == str(out) else "file")
        assert (out / "file").exists() == (steps[-1] == "directory")
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    put(source, out / "file")
    assert steps == ["file", "directory"]


# --- standard output --------------------------------------------------------------------------------------------------

STREAM = """
import os, sys
from pathlib import Path
from swarm.errors import SwarmError
from swarm.export import check_target, export
check_target(Path("-"), overwrite=False)
fd = os.open(sys.argv[1], os.O_RDONLY)
try:
    print(export(fd, Path("-"), overwrite=False, expect_length=os.fstat(fd).st_size), file=sys.stderr)
except SwarmError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_a_dash_streams_to_standard_output(source: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "store" / "content")]
    result = subprocess.run(command, capture_output=True, timeout=30)
    assert result.stdout == DATA
    assert b"stream" in result.stderr


def test_a_reader_that_goes_away_is_no_traceback(source: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "store" / "content")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == DATA[:10]
        process.stdout.close()
        message = process.stderr.read()
        assert process.wait(30) == Interrupted.exit_code
    assert b"Traceback" not in message


def test_a_full_disk_behind_standard_output_is_said(source: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STREAM, str(tmp_path / "store" / "content")]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=30)
    assert result.returncode == NoSpace.exit_code
    assert b"no space left for standard output" in result.stderr
