"""The pages about container runtimes, followed to the letter on a machine where nothing of it is set up.

The machine is a host with an /etc of its own on top of this one's, empty state directories, and a `systemctl` that knows
how to start, restart and reload the three services of the pages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import ROOT
from tests.system.cluster import SWARM, clean_environment, hosts_dir
from tests.system.hosts import Hosts, make_directory
from tests.system.hub import Hub
from tests.system.images import Image
from tests.system.mirrored import members, small_image
from tests.system.registry import Registry
from tests.system.runtimes import Place

pytestmark = pytest.mark.system

_BLOCK: Final = re.compile(r"<!-- tested(?:: (/\S+))? -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_MACHINE: Final = """\
mkdir -p $WORK/upper $WORK/layer
mount -t overlay -o lowerdir=/etc,upperdir=$WORK/upper,workdir=$WORK/layer none /etc
for d in /var/lib/swarm /var/lib/containerd /run/containerd /var/lib/containers /run/containers /run/libpod \
         /var/lib/docker /run/docker /var/lib/cni; do
  mkdir -p $d; mount -t tmpfs none $d
done
printf 'nameserver 127.0.0.1\\n' > /etc/resolv.conf
printf '127.0.0.1 localhost\\n10.77.0.254 registry.lan\\n10.77.0.1 swarm.example.com\\n' > /etc/hosts
mkdir -p /etc/swarm && cp -r $WORK/network /etc/swarm/network
cp $WORK/swarm.toml /etc/swarm/swarm.toml
rm -f /etc/docker/daemon.json
chmod 700 /var/lib/swarm
systemctl restart swarm
"""

_SYSTEMCTL: Final = """\
#!/bin/sh
# restart|reload swarm|containerd|docker
set -e
pid=/run/docker/$2.pid-of-test; log=$WORK/$2.log
if [ "$1" = reload ]; then kill -HUP "$(cat $pid)"; sleep 1; exit 0; fi
if [ -e $pid ]; then kill "$(cat $pid)"; while kill -0 "$(cat $pid)" 2>/dev/null; do sleep 0.05; done; fi
case $2 in
  swarm) swarm daemon --config /etc/swarm/swarm.toml >>$log 2>&1 & ready='swarm status' ;;
  containerd) containerd >>$log 2>&1 & ready='ctr version' ;;
  docker) dockerd --bridge none --iptables=false --storage-driver overlay2 >>$log 2>&1 & ready='docker version' ;;
esac
echo $! >$pid
for i in $(seq 200); do $ready >/dev/null 2>&1 && exit 0; sleep 0.1; done
echo "$2 did not start:" >&2; tail $log >&2; exit 1
"""


def actions(page: str) -> Iterator[tuple[str, str]]:
    """What a page has its reader do: lines to append to a file, or (without a file) a command to type."""
    for file, content in _BLOCK.findall((ROOT / "docs/how-to" / page).read_text()):
        if file:
            yield file, content
        else:
            yield from (("", line.removeprefix("# ")) for line in content.splitlines() if line.startswith("# "))


@dataclass(slots=True)
class Machine:
    """A root shell on a machine with a node and no mirror."""

    hosts: Hosts
    work: Path
    registry: Registry
    shell: subprocess.Popen[str]

    def export(self, name: str, value: str) -> None:
        """For everything that runs from now on."""
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"export {name}={value}\n")

    def run(self, script: str) -> str:
        """What it prints; it must end well."""
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        self.shell.stdin.write(f"( set -e; {script}\n) 2>&1; echo; echo @@end $?\n")
        self.shell.stdin.flush()
        said: list[str] = []
        for line in self.shell.stdout:
            if line.startswith("@@end "):
                assert line == "@@end 0\n", f"{script}: {''.join(said)}"
                return "".join(said)
            said.append(line)
        raise AssertionError(f"the shell ended at {script}: {''.join(said)}")

    def follow(self, page: str) -> list[str]:
        """Do all that the page says; returns the commands."""
        commands = []
        for file, content in actions(page):
            if file:
                self.run(f"cat >> {file} <<'@@file'\n{content}@@file")
            else:
                self.run(content)
                commands.append(content)
        return commands

    def settings(self) -> dict[str, bytes]:
        """Every file of /etc that differs from this machine's, but for what podman locks."""
        upper = self.work / "upper"
        return {
            str(path.relative_to(upper)): path.read_bytes()
            for path in upper.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        }


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Hosts(1) as hosts, Registry(hosts) as registry:
        work = make_directory("w", hosts_dir())
        try:
            members(work / "ca", 1)
            shutil.copytree(work / "ca/n/1", work / "network")
            example = (ROOT / "docs/how-to/swarm.toml").read_text()
            # Docker Hub is here: that it can be reached is what the pages take for granted.
            (work / "swarm.toml").write_text(example + f'\n[mirror.registry."docker.io"]\nendpoint = "{registry.base}"\n')
            # Locks as files: otherwise podman leaves a segment in /dev/shm that all of the machine's podmans share.
            (work / "containers.conf").write_text('[engine]\nlock_type = "file"\n')
            (work / "bin").mkdir()
            (work / "bin/systemctl").write_text(_SYSTEMCTL)
            (work / "bin/systemctl").chmod(0o755)
            path = f"{work}/bin:{Path(SWARM).parent}:{os.environ['PATH']}"
            with subprocess.Popen(
                Place(hosts, 1).with_cgroups(["bash", "--norc"]), cwd=work, text=True,
                env={**clean_environment(), "PATH": path, "WORK": str(work), "HOME": str(work),
                     "CONTAINERS_CONF": str(work / "containers.conf")},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr,
            ) as shell:  # fmt: skip
                made = Machine(hosts, work, registry, shell)
                made.run(_MACHINE)
                try:
                    yield made
                finally:
                    shell.kill()
                    hosts.down()
        finally:
            shutil.rmtree(work, ignore_errors=True)


def pushed(machine: Machine, repository: str, tag: str) -> Image:
    image = small_image(machine.registry)
    machine.registry.push(image, repository, tag)
    return image


def assert_read_once_by_swarm(machine: Machine, image: Image) -> None:
    machine.run("kill $(cat /run/docker/swarm.pid-of-test); sleep 1")
    assert machine.registry.copies(image) == 1
    assert {it.agent.partition("/")[0].lower() for it in machine.registry.requests()} == {"swarm"}


def test_the_page_about_containerd_works_as_written(machine: Machine) -> None:
    image = pushed(machine, "team/app", "v1")
    machine.run("systemctl restart containerd")
    before = set(machine.settings())
    commands = machine.follow("containerd.md")
    assert any(it.startswith("ctr images pull") for it in commands)
    assert_read_once_by_swarm(machine, image)
    assert set(machine.settings()) == before | {"containerd/config.toml"}


def test_the_page_about_podman_works_as_written(machine: Machine) -> None:
    image = pushed(machine, "team/app", "v1")
    before = set(machine.settings())
    commands = machine.follow("podman.md")
    assert any(it.startswith("podman pull") for it in commands)
    assert_read_once_by_swarm(machine, image)
    assert set(machine.settings()) == before


def test_the_page_about_docker_works_as_written(machine: Machine) -> None:
    image = pushed(machine, "library/alpine", "3")
    machine.run("""printf '{\\n    "max-concurrent-downloads": 2\\n}' > /etc/docker/daemon.json; systemctl restart docker""")
    before = machine.settings()
    commands = machine.follow("docker.md")
    assert any(it.startswith("docker pull") for it in commands)
    assert_read_once_by_swarm(machine, image)
    after = machine.settings()
    assert set(after) == set(before)
    assert after["docker/daemon.json"] == before["docker/daemon.json"]


def test_the_page_about_hugging_face_works_as_written(machine: Machine) -> None:
    hub = Hub(machine.hosts, machine.work / "hub")
    files = {"config.json": b"{}", "model.safetensors": os.urandom(3_000_000), "vocab.json": b"[1, 2]"}
    commit = hub.push("openai-community/gpt2", files)
    hub.start()
    try:
        # The page takes for granted that the hub can be reached; here it is this one, with its storage.
        machine.export("SWARM_MIRROR_HUGGINGFACE", hub.base)
        machine.export("SWARM_EGRESS_ALLOW", machine.hosts.address(0))
        before = set(machine.settings())
        commands = machine.follow("hugging-face.md")
        assert any("hf download" in it for it in commands)
        snapshot = machine.work / f".cache/huggingface/hub/models--openai-community--gpt2/snapshots/{commit}"
        assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == files
        machine.run("kill $(cat /run/docker/swarm.pid-of-test); sleep 1")
        assert hub.copies(files) == 1
        assert {it.agent for it in hub.log()} == {"swarm"}
        assert set(machine.settings()) == before
    finally:
        hub.stop()
