"""Real clients: containerd with its own root, state and socket, podman with its own storage, skopeo with nothing.

Each has a directory of its own, which whoever made it removes, and its own mount namespace: what it mounts is gone with
it.  None reads the machine's settings of registries.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.system import cri
from tests.system.hosts import Hosts

TIMEOUT: Final = 60.0  # seconds for a pull, unless the caller knows better

# As root, podman and skopeo keep a cache of where blobs were seen here, whatever they are told: each gets its own.
_OWN_CACHE: Final = ("sh", "-c", 'mkdir -p /var/lib/containers; mount -t tmpfs none /var/lib/containers && exec "$0" "$@"')
# `ip netns exec` gives a mount namespace; without hosts this does.  What is mounted outside is still seen.
_OWN_MOUNTS: Final = ("unshare", "--mount", "--propagation", "slave")


class RuntimeFailed(Exception):
    """A client did not start; the message is the end of its log."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """How a pull ended.

    Attributes:
        code: The client's exit code; 124 if it ran into the time limit.
    """

    code: int
    seconds: float
    said: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client runs: in a host, or on this machine."""

    hosts: Hosts | None = None
    host: int = 1

    def command(self, argv: Sequence[str]) -> list[str]:
        return [*_OWN_MOUNTS, *argv] if self.hosts is None else self.hosts.command(self.host, argv)

    def with_cgroups(self, argv: Sequence[str]) -> list[str]:
        """As `command`, but with the machine's /sys, of which `ip netns exec` would leave out the control groups."""
        network = [] if self.hosts is None else ["nsenter", f"--net=/run/netns/{self.hosts.namespace(self.host)}"]
        return [*network, *_OWN_MOUNTS, *argv]

    def pull(self, argv: Sequence[str], timeout: float, environment: dict[str, str]) -> Pulled:
        began = time.monotonic()
        try:
            done = subprocess.run(
                self.command(argv), capture_output=True, text=True, timeout=timeout, env=environment, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return Pulled(124, time.monotonic() - began, "")
        return Pulled(done.returncode, time.monotonic() - began, done.stdout + done.stderr)


HERE: Final = Place()


def _environment(home: Path, **more: str) -> dict[str, str]:
    """What a client sees: no setting, login or proxy of whoever runs the tests."""
    return {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), **more}


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# --- containerd -----------------------------------------------------------------------------------------------------

_CONTAINERD: Final = """\
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{root}/c.sock"
[ttrpc]
  address = "{root}/t.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.example/pause:1"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{certs}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "{root}/cni"
"""
# What wants a file system, device or service that a test machine has not.
_DISABLED: Final = (
    *(f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")),
    "io.containerd.internal.v1.opt",
    "io.containerd.tracing.processor.v1.otlp",
)


class Containerd:
    """One containerd; use it with `with`.

    Args:
        directory: Its own; short enough for a socket's path (about 80 characters).
        certs: Where it looks for ``hosts.toml``; in `directory` by default.

    Attributes:
        certs: As given; the directory exists.
        config: Its configuration, which names `certs`.
    """

    def __init__(self, directory: Path, place: Place = HERE, *, certs: Path | None = None) -> None:
        self.directory = _made(directory)
        self.certs = _made(certs or directory / "certs.d")
        self.config = directory / "config.toml"
        self._place = place
        self._control = directory / "c.sock"
        self._log = directory / "containerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Containerd:
        disabled = json.dumps(_DISABLED)[1:-1]
        self.config.write_text(_CONTAINERD.format(root=self.directory, certs=self.certs, disabled=disabled))
        argv = self._place.command(["containerd", "-c", str(self.config)])
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(self.directory)
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 20
        while "containerd successfully booted" not in (said := self.log()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeFailed(said[-2000:])
            time.sleep(0.01)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait(10)

    def ctr(self, *arguments: str) -> list[str]:
        """The command line of ctr, which does a pull's transfers itself."""
        return ["ctr", "-a", str(self._control), *arguments]

    def pull(self, reference: str, *options: str, timeout: float = TIMEOUT) -> Pulled:
        """`ctr images pull`: fetch and unpack."""
        argv = self.ctr("images", "pull", "--hosts-dir", str(self.certs), *options, reference)
        return self._place.pull(argv, timeout, _environment(self.directory))

    def fetch(self, reference: str, *options: str, timeout: float = TIMEOUT) -> Pulled:
        """`ctr content fetch`: the same requests, nothing unpacked."""
        return self._place.pull(self.fetching(reference, *options), timeout, _environment(self.directory))

    def fetching(self, reference: str, *options: str) -> list[str]:
        """The command line of `fetch`, to be run in the same place."""
        return self.ctr("content", "fetch", "--hosts-dir", str(self.certs), *options, reference)

    def cri_pull(self, reference: str, *, login: tuple[str, str] | None = None, timeout: float = TIMEOUT) -> Pulled:
        """What a kubelet does: containerd itself fetches and unpacks; `login` is a pod's pull secret."""
        began = time.monotonic()
        user, password = login or ("", "")
        try:
            cri.pull(self._control, reference, user=user, password=password, timeout=timeout)
        except cri.CallFailed as error:
            return Pulled(1, time.monotonic() - began, str(error))
        except TimeoutError:
            return Pulled(124, time.monotonic() - began, "")
        return Pulled(0, time.monotonic() - began, "")

    def content(self, digest: str) -> Path:
        """Where a blob lies once it is fetched."""
        algorithm, _, encoded = digest.partition(":")
        return self.directory / "root/io.containerd.content.v1.content/blobs" / algorithm / encoded


# --- Docker ---------------------------------------------------------------------------------------------------------

# What dockerd writes whatever it is told goes to directories of its own.  It looks Docker Hub up before it asks a mirror:
# a name server that is not there refuses at once, where one that cannot be reached would take ten seconds.
_OWN_DOCKER: Final = """\
for d in /etc/docker /run/docker; do mkdir -p $d; mount -t tmpfs none $d; done
echo nameserver 127.0.0.1 > /run/docker/resolv.conf
mount --bind /run/docker/resolv.conf /etc/resolv.conf
exec "$0" "$@"
"""


class Docker:
    """One dockerd, which starts a containerd of its own; use it with `with`.

    Args:
        directory: Its own; short enough for a socket's path.

    Attributes:
        settings: Its daemon.json; there is none at first.
    """

    def __init__(self, directory: Path, place: Place = HERE) -> None:
        self.directory = _made(directory)
        self.settings = directory / "daemon.json"
        self._place = place
        self._log = directory / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Docker:
        at = self.directory
        argv = ["dockerd", "-H", f"unix://{at}/s", "--data-root", f"{at}/root", "--exec-root", f"{at}/exec"]
        argv += ["--pidfile", f"{at}/pid", "--bridge", "none", "--iptables=false", "--storage-driver", "overlay2"]
        argv += ["--config-file", str(self.settings)] if self.settings.exists() else []
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._place.with_cgroups(["sh", "-ec", _OWN_DOCKER, *argv]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(at),
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 30
            while "API listen on" not in (said := self._log.read_text(errors="replace")):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeFailed(said[-2000:])
                time.sleep(0.02)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def reload(self) -> None:
        """What `systemctl reload docker` does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 10
        while "Reloaded configuration" not in (said := self._log.read_text(errors="replace")):
            if time.monotonic() > deadline:
                raise RuntimeFailed(said[-2000:])
            time.sleep(0.02)

    def close(self) -> None:
        """SIGTERM, so that it ends its containerd too."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(20)

    def pull(self, reference: str, *, timeout: float = TIMEOUT) -> Pulled:
        argv = ["docker", "-H", f"unix://{self.directory}/s", "pull", "-q", reference]
        return self._place.pull(argv, timeout, _environment(self.directory))


# --- podman and skopeo ----------------------------------------------------------------------------------------------


class Podman:
    """podman with a storage of its own.

    Attributes:
        registries: Its registries.conf; empty at first.
        logins: Its credentials (`auth.json`); none at first.
    """

    def __init__(self, directory: Path, place: Place = HERE) -> None:
        self.directory = _made(directory)
        self._place = place
        self.registries, self.logins = directory / "registries.conf", directory / "auth.json"
        self.registries.touch()
        self.logins.write_text("{}")
        # Locks as files: otherwise podman leaves a segment in /dev/shm that all of the machine's podmans share.
        (directory / "containers.conf").write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
        (directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    def _command(self, *arguments: str) -> list[str]:
        argv = [*_OWN_CACHE, "podman", "--root", f"{self.directory}/root", "--runroot", f"{self.directory}/run"]
        return [*argv, "--tmpdir", f"{self.directory}/tmp", "--storage-driver", "overlay", *arguments]

    def environment(self) -> dict[str, str]:
        return _environment(
            self.directory,
            CONTAINERS_CONF=f"{self.directory}/containers.conf",
            CONTAINERS_REGISTRIES_CONF=str(self.registries),
            REGISTRY_AUTH_FILE=str(self.logins),
        )

    def pull(self, reference: str, *options: str, timeout: float = TIMEOUT) -> Pulled:
        policy = f"--signature-policy={self.directory}/policy.json"
        return self._place.pull(self._command("pull", "-q", policy, *options, reference), timeout, self.environment())

    def log_in(self, where: str, user: str, password: str) -> Pulled:
        """`podman login` as the page about podman has it."""
        argv = self._command("login", "--tls-verify=false", "-u", user, "-p", password, where)
        return self._place.pull(argv, TIMEOUT, self.environment())


class Skopeo:
    """skopeo, which copies an image into a directory.

    Attributes:
        registries: Its registries.conf; empty at first.
        logins: Its credentials (`auth.json`); none at first.
    """

    def __init__(self, directory: Path, place: Place = HERE) -> None:
        self.directory = _made(directory)
        self._place = place
        self.registries, self.logins = directory / "registries.conf", directory / "auth.json"
        self.registries.touch()
        self.logins.write_text("{}")
        self.out = directory / "image"

    def pulling(self, reference: str, *options: str) -> list[str]:
        """The command line of `pull`, to be run in the same place."""
        argv = [*_OWN_CACHE, "skopeo", "--insecure-policy", "--registries-conf", str(self.registries), "copy", "-q", *options]
        return [*argv, f"docker://{reference}", f"dir:{self.out}"]

    def environment(self) -> dict[str, str]:
        return _environment(self.directory, REGISTRY_AUTH_FILE=str(self.logins))

    def pull(self, reference: str, *options: str, timeout: float = TIMEOUT) -> Pulled:
        return self._place.pull(self.pulling(reference, *options), timeout, self.environment())

    def content(self, digest: str) -> Path:
        """Where a blob lies once it is pulled."""
        return self.out / digest.partition(":")[2]
