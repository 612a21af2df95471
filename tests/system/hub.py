"""A stand-in for a Hugging Face hub in host 0, and its storage at another port of it; and the real client on other hosts.

What the hub answers is `tests.mirror.fake_hub`'s.  Its log says how many bytes of which path it sent: *copies* of a file are
those bytes / its length, as with `tests.system.origin`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tests.mirror.fake_hub import FakeHub, git_id, is_large, sha256
from tests.system.cluster import SWARM, Cluster, clean_environment, hosts_dir
from tests.system.hosts import Hosts, make_directory
from tests.system.mirrored import MIRROR
from tests.system.processes import Prepared, start_together, wait

PORT: Final = 8090
STORAGE_PORT: Final = 8091
ROOT: Final = Path(__file__).parent.parent.parent
ENDPOINT: Final = f"http://{MIRROR}/hf"
CHUNK_BYTES: Final = 256 * 1024


class HubFailed(Exception):
    """The hub did not start; the message is the end of its log."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One line of its log."""

    face: str
    method: str
    path: str
    status: int
    sent: int
    sender: str
    agent: str


class Hub:
    """The hub; `start` it once everything was pushed.

    Attributes:
        fake: What it serves, as this process knows it.
    """

    def __init__(self, hosts: Hosts, directory: Path, *, signed_seconds: float = 3600.0) -> None:
        self._hosts = hosts
        self._directory = directory
        self._signed_seconds = signed_seconds
        self._pushes: list[dict[str, Any]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = 0
        self.base = f"http://{hosts.endpoint(0, PORT)}"
        self.fake = FakeHub()
        (directory / "files").mkdir(parents=True)

    def push(self, repository: str, files: Mapping[str, bytes], *refs: str, **more: Any) -> str:
        """As `FakeHub.push`."""
        for content in files.values():
            (self._directory / "files" / sha256(content)).write_bytes(content)
        names = {path: sha256(content) for path, content in files.items()}
        readers = sorted(more["readers"]) if more.get("readers") is not None else None
        push = {"repository": repository, "files": names, "refs": refs, "readers": readers, "gated": more.get("gated", False)}
        self._pushes.append(push)
        return self.fake.push(repository, files, *refs, **more)

    def start(self) -> None:
        (self._directory / "pushes.json").write_text(json.dumps(self._pushes))
        argv = [sys.executable, "-m", "tests.system.hub", "--address", self._hosts.address(0)]
        argv += ["--directory", str(self._directory), "--signed-seconds", str(self._signed_seconds)]
        said = self._directory / "said"
        with said.open("wb") as out:
            self._process = subprocess.Popen(
                self._hosts.command(0, argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT
            )
        deadline = time.monotonic() + 20
        while not re.search(rb"listening", said.read_bytes()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise HubFailed(said.read_text()[-2000:])
            time.sleep(0.01)

    def stop(self) -> None:
        """Nobody can read it any more, nor its storage; the log stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def log(self) -> list[Sent]:
        """The requests that ended since the last `forget`."""
        path = self._directory / "log"
        if not path.exists():
            return []
        with path.open("rb") as log:
            log.seek(self._seen)
            return [Sent(**json.loads(line)) for line in log if line.endswith(b"\n")]

    def forget(self) -> None:
        """Count from here."""
        path = self._directory / "log"
        self._seen = path.stat().st_size if path.exists() else 0

    def sent(self, path: str, content: bytes) -> int:
        """Bytes of this file since then."""
        end = f"/repos/{sha256(content)}/{quote(path.rpartition('/')[2])}" if is_large(path) else f"/{quote(path, safe='')}"
        reads = [it for it in self.log() if it.method == "GET" and it.status in (200, 206)]
        return sum(it.sent for it in reads if it.path.endswith(end))

    def copies(self, files: Mapping[str, bytes]) -> float:
        """Copies of all of these, by bytes."""
        return sum(self.sent(path, content) for path, content in files.items()) / sum(map(len, files.values()))


class Face(BaseHTTPRequestHandler):
    """One of its two ports."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub
    log_path: Path
    name: str
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        now = time.time()
        if self.name == "hub":
            reply = self.hub.serve(self.command, self.path, headers, body, now)
        else:
            reply = self.hub.storage(self.command, self.path, headers, now)
        self.send_response(reply.status)
        for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        sent = 0
        try:
            while self.command != "HEAD" and sent < len(reply.body):
                sent += self.connection.send(memoryview(reply.body)[sent : sent + CHUNK_BYTES])
        except OSError:
            self.close_connection = True
        path, agent = self.path.partition("?")[0], headers.get("user-agent", "")
        line = Sent(self.name, self.command, path, reply.status, sent, self.client_address[0], agent)
        fields = {name: getattr(line, name) for name in Sent.__slots__}
        with self.lock, self.log_path.open("a") as log:
            log.write(json.dumps(fields) + "\n")


# --- hosts with the real client ---------------------------------------------------------------------------------------


class Hubbed:
    """What a test works with; made by `hubbed`."""

    def __init__(self, hosts: Hosts, hub: Hub, cluster: Cluster, work: Path) -> None:
        self.hosts, self.hub, self.cluster, self.work = hosts, hub, cluster, work
        self._count = 0

    def home(self, host: int) -> Path:
        return self.work / f"hf{host}"

    def forget_client(self, host: int) -> None:
        """What the client has cached is gone, as on a machine where it never ran."""
        shutil.rmtree(self.home(host), ignore_errors=True)

    def environment(self, host: int, token: str = "") -> dict[str, str]:
        """As the page says, and nothing that this machine's user has set; Xet is left on."""
        given = {"HF_ENDPOINT": ENDPOINT, "HF_HOME": str(self.home(host)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HOME": str(self.home(host))}
        return {**clean_environment(), **given, **quiet, **({"HF_TOKEN": token} if token else {})}

    def prepared(self, host: int, script: str, token: str = "") -> Prepared:
        self._count += 1
        self.home(host).mkdir(exist_ok=True)
        argv = self.hosts.command(host, [sys.executable, "-c", f"import huggingface_hub as hf, json\n{script}"])
        return Prepared(argv, self.work, f"client{self._count}", environment=self.environment(host, token))

    def run_all(self, scripts: Mapping[int, str], token: str = "", timeout: float = 90) -> dict[int, str]:
        """Python with the client as `hf`, on these hosts at the same moment; what each printed last."""
        prepared = {host: self.prepared(host, script, token) for host, script in scripts.items()}
        try:
            start_together(list(prepared.values()))
            wait(list(prepared.values()), timeout)
            said = {}
            for host, it in prepared.items():
                assert it.ended is not None
                assert it.ended.code == 0, f"host {host}: {it.ended.err[-3000:]}"
                said[host] = it.ended.out.strip().rpartition("\n")[2]
            return said
        finally:
            for it in prepared.values():
                it.close()

    def run(self, host: int, script: str, token: str = "", timeout: float = 60) -> str:
        return self.run_all({host: script}, token, timeout)[host]

    def hf(self, host: int, *arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
        """The client's command."""
        self.home(host).mkdir(exist_ok=True)
        argv = self.hosts.command(host, [str(Path(SWARM).parent / "hf"), *arguments])
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=self.environment(host, token))

    def log(self, host: int) -> str:
        return self.cluster.daemons[host].log.read_text(errors="replace")


def assert_same(directory: Path, files: Mapping[str, bytes]) -> None:
    """All of these are there, byte for byte, and nothing else."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert found.keys() == files.keys()
    assert [name for name in files if found[name] != files[name]] == []
    assert [git_id(found[name]) for name in files] == [git_id(files[name]) for name in files]


@contextmanager
def hubbed(
    number: int,
    *,
    rate: str | None = None,
    network: Mapping[int, Path] | None = None,
    signed_seconds: float = 3600.0,
    more: str = "",
    options: Sequence[str] = (),
) -> Iterator[Hubbed]:
    """`number` hosts with a hub in host 0; neither it nor any daemon runs yet."""
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(number))
        work = make_directory("hub", hosts_dir())
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        hub = Hub(hosts, work / "hub", signed_seconds=signed_seconds)
        stack.callback(hub.stop)
        config = work / "swarm.toml"
        # Both have private addresses here: the hub is named, its storage must be allowed.
        config.write_text(f'{more}\n[egress]\nallow = ["{hosts.address(0)}"]\n[mirror]\nhuggingface = "{hub.base}"\n')
        chosen = ["--config", str(config), "--mirror", MIRROR, *options]
        cluster = stack.enter_context(Cluster(hosts, network=dict(network) if network else None, options=chosen))
        if rate is not None:
            hosts.limit_all(rate)
        yield Hubbed(hosts, hub, cluster, work)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.system.hub")
    parser.add_argument("--address", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--signed-seconds", type=float, required=True)
    given = parser.parse_args()
    hub = FakeHub(
        base=f"http://{given.address}:{PORT}",
        storage_base=f"http://{given.address}:{STORAGE_PORT}",
        signed_seconds=given.signed_seconds,
    )
    for push in json.loads((given.directory / "pushes.json").read_text()):
        files = {path: (given.directory / "files" / name).read_bytes() for path, name in push["files"].items()}
        readers = set(push["readers"]) if push["readers"] is not None else None
        hub.push(push["repository"], files, *push["refs"], readers=readers, gated=push["gated"])
    common = {"hub": hub, "log_path": given.directory / "log"}
    faces = {PORT: "hub", STORAGE_PORT: "storage"}
    servers = [
        ThreadingHTTPServer((given.address, port), type(name, (Face,), {**common, "name": name}))
        for port, name in faces.items()
    ]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print("listening", flush=True)
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
