"""Files that hold secrets."""

import errno
import os
from pathlib import Path

import pytest

from swarm import private_files
from swarm.errors import ConfigError


def test_a_new_file_is_whole_and_private(tmp_path: Path):
    private_files.create(tmp_path / "key", b"secret")
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path):
    private_files.create(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        private_files.create(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"


def test_a_new_file_never_takes_the_place_of_a_dangling_link(tmp_path: Path):
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        private_files.create(tmp_path / "key", b"secret")
    assert (tmp_path / "key").is_symlink()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        private_files.create(tmp_path / "key", b"secret")
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_keeps_the_old_content_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    private_files.replace(tmp_path / "key", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        private_files.replace(tmp_path / "key", b"new")
    assert (tmp_path / "key").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("owner", "mode", "accepted"),
    [
        (1000, 0o600, True),
        (1000, 0o400, True),
        (1000, 0o640, False),
        (1000, 0o604, False),
        (0, 0o600, True),
        (0, 0o640, True),  # a mounted secret: owned by root, readable by the service's group
        (0, 0o440, True),
        (0, 0o660, False),
        (0, 0o644, False),
        (0, 0o641, False),
    ],
)
def test_who_may_open_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, accepted: bool):
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    path.chmod(mode)
    real = os.fstat

    def owned(descriptor: int) -> os.stat_result:
        fields = list(real(descriptor))
        fields[4] = owner
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", owned)
    if accepted:
        assert private_files.read_private(path, max_bytes=100) == b"secret"
    else:
        with pytest.raises(ConfigError, match="open to others"):
            private_files.read_private(path, max_bytes=100)


def test_a_file_that_is_too_long_is_refused(tmp_path: Path):
    private_files.create(tmp_path / "key", bytes(101))
    with pytest.raises(ConfigError, match="longer than 100"):
        private_files.read_private(tmp_path / "key", max_bytes=100)
    with pytest.raises(ConfigError, match="longer than 100"):
        private_files.read_public(tmp_path / "key", max_bytes=100)


def test_a_pipe_in_the_place_of_a_secret_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "key", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        private_files.read_private(tmp_path / "key", max_bytes=100)


def test_a_directory_in_the_place_of_a_file_is_said(tmp_path: Path):
    (tmp_path / "key").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="not a regular file"):
        private_files.read_private(tmp_path / "key", max_bytes=100)
    with pytest.raises(ConfigError, match="Is a directory"):
        private_files.read_public(tmp_path / "key", max_bytes=100)


def test_a_lock_needs_a_directory(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"), private_files.locked(tmp_path / "missing"):
        pass
