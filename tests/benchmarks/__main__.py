"""`make bench`, or ``python -m tests.benchmarks [CASE...] [--runs N] [--list] [--json DIR] [--show FILE]``: root, a
quiet machine.

Prints a line per case as it ends, then the table; raw results go to ``results/``.  Ends with 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from tests.benchmarks import many, mirror, one, parts
from tests.benchmarks.many import BenchmarkFailed, Setting
from tests.benchmarks.report import Limit, Result, Run, machine, read, row, table, write
from tests.system.cluster import hosts_dir
from tests.system.hosts import HostsError
from tests.system.origin import MIB, OriginFailed
from tests.system.processes import NotReady
from tests.system.registry import RegistryFailed
from tests.system.runtimes import RuntimeFailed

# "At the same moment" is within 50 ms; a run on a machine too busy for that says nothing.
TOGETHER: Final = Limit("start_spread_s", 0.05)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        measure: Called with a seed; raises what `FAILURES` lists.
    """

    name: str
    title: str
    measure: Callable[[int], Run]
    limits: tuple[Limit, ...] = ()
    floor: float | None = None


FAILURES: Final = (BenchmarkFailed, HostsError, NotReady, OriginFailed, RegistryFailed, RuntimeFailed)
FIRST_SEED: Final = 3  # seeds differ between runs, and are the same from one `make bench` to the next

MBIT_50 = Setting(hosts=20, length=100 * MIB, link=50)
MBIT_100 = Setting(hosts=10, length=100 * MIB, link=100)
ORIGIN_200 = Setting(hosts=20, length=100 * MIB, origin=200)
# Store and output of ten hosts would be 20 GiB of memory; as hard links they are 10.
GIB_100 = Setting(hosts=10, length=1024 * MIB, link=100, hard_link=True)
SMALL = Setting(hosts=20, length=3 * MIB, link=100)
TINY = Setting(hosts=20, length=200 * 1024, link=100)
ALONE = Setting(hosts=1, length=100 * MIB, link=50)
JOINING = Setting(hosts=20, length=100 * MIB, link=100)

# 481 MiB of files in five layers, 245 MiB on the wire.
IMAGE = mirror.Setting(4, (1, 10, 50, 120, 300), 245 * MIB, random_share=0.49, origin=200)
IMAGE_12 = mirror.Setting(12, (1, 10, 30, 60), 101 * MIB, link=100)
UPDATE = mirror.Setting(4, (1, 10, 20, 40, 20), 20 * MIB, origin=200)


def _swarm(name: str, title: str, setting: Setting, last_done: float, copies: float = 1.05) -> Case:
    """All at once, with a bound in seconds for the last one."""
    limits = (Limit("copies", copies), Limit("seconds", last_done), TOGETHER)
    return Case(name, title, functools.partial(many.at_once, setting), limits, setting.floor)


def _other(name: str, title: str, measure: Callable[[Setting, int], Run], setting: Setting) -> Case:
    """Somebody else's way, for comparison: no limits."""
    return Case(name, title, functools.partial(measure, setting), floor=setting.floor)


CASES: Final = (
    Case(
        "footprint",
        "an idle daemon, its start, and --help",
        lambda seed: one.footprint(5),
        (Limit("ready_s", 1.0), Limit("help_s", 0.3), Limit("idle_resident_mib", 60)),
    ),
    Case(
        "again",
        "100 MiB that the host has already",
        functools.partial(many.again, Setting(hosts=1, length=100 * MIB, origin=1000)),
        (Limit("copies", 0), Limit("seconds", 0.4), Limit("requests", 1), Limit("requests_by_digest", 0)),
    ),
    _swarm("20x50", "20 hosts, all links 50 Mbit/s, 100 MiB", MBIT_50, 1.3 * MBIT_50.floor),
    _other("20x50-libtorrent", "the same by libtorrent", many.libtorrent, MBIT_50),
    _swarm("10x100", "10 hosts, all links 100 Mbit/s, 100 MiB", MBIT_100, 1.4 * MBIT_100.floor),
    _other("10x100-libtorrent", "the same by libtorrent", many.libtorrent, MBIT_100),
    _swarm("20x200", "20 hosts, origin 200 Mbit/s, others free, 100 MiB", ORIGIN_200, 10.0),
    _other("20x200-libtorrent", "the same by libtorrent", many.libtorrent, ORIGIN_200),
    _other("20x200-curl", "the same when everyone reads the origin", many.curl, ORIGIN_200),
    _swarm("10x100-1gib", "10 hosts, all links 100 Mbit/s, 1 GiB", GIB_100, 1.25 * GIB_100.floor),
    Case(
        "small",
        "20 hosts, all links 100 Mbit/s, 3 MiB",
        functools.partial(many.at_once, SMALL),
        (Limit("copies", 1.1), Limit("own_seconds", 2.0), TOGETHER),
        SMALL.floor,
    ),
    Case(
        "tiny",
        "20 hosts, all links 100 Mbit/s, 200 KiB",
        functools.partial(many.at_once, TINY),
        (Limit("reads", 2), Limit("own_seconds", 1.0), TOGETHER),
        TINY.floor,
    ),
    Case(
        "alone",
        "1 host, 50 Mbit/s, 100 MiB, against curl over the same link",
        functools.partial(many.alone, ALONE),
        (Limit("copies", 1.004), Limit("of_curl", 1.1)),  # 1.00 to two digits
        ALONE.floor,
    ),
    Case(
        "joining",
        "20 hosts begin one by one every 0.5 s, all links 100 Mbit/s, 100 MiB",
        functools.partial(many.joining, JOINING, every=0.5),
        (Limit("copies", 1.02),),
        JOINING.floor,
    ),
    Case(
        "killed",
        "20 hosts, all links 50 Mbit/s, 100 MiB, 6 killed (-9) in the middle",
        functools.partial(many.killed, MBIT_50, victims=6),
        (Limit("copies", 1.2), Limit("seconds", 1.5 * MBIT_50.floor), TOGETHER),
        MBIT_50.floor,
    ),
    Case(
        "one-to-one",
        "1 GiB over loopback onto disk, against nginx, curl and sha256sum, and against libtorrent",
        lambda seed: one.one_to_one(one.GIB, seed, parent=one.disk_dir()),
        (Limit("of_plain_rate", 0.6, at_least=True), Limit("of_libtorrent_cpu", 0.45), Limit("most_resident_mib", 200)),
    ),
    Case(
        "one-to-one-copy",
        "the same with a second copy as the output, beside the store's own",
        lambda seed: one.one_to_one(one.GIB, seed, parent=one.disk_dir(), link=False),
    ),
    Case(
        "one-to-one-memory",
        "the same into memory: without the disk's share",
        lambda seed: one.one_to_one(one.GIB, seed, parent=hosts_dir()),
    ),
    Case(
        "mirror-4",
        "4 containerds pull and unpack a 245 MiB image through mirrors, registry 200 Mbit/s",
        functools.partial(mirror.containerds, IMAGE),
        (Limit("copies", 1.05), Limit("seconds", 14.0), TOGETHER),
        IMAGE.floor,
    ),
    Case(
        "mirror-4-plain",
        "the same without mirrors",
        functools.partial(mirror.containerds, IMAGE, mirror=False),
        floor=IMAGE.floor,
    ),
    Case(
        "mirror-12",
        "12 ctr content fetch of a 101 MiB image through mirrors, all links 100 Mbit/s",
        functools.partial(mirror.fetching, IMAGE_12),
        (Limit("copies", 1.05), TOGETHER),
        IMAGE_12.floor,
    ),
    Case(
        "mirror-update",
        "4 containerds have an image and pull one with another last layer (20 of 91 MiB), registry 200 Mbit/s",
        functools.partial(mirror.updating, UPDATE),
        (Limit("new_layer_copies", 1.05), Limit("old_layers_bytes", 0), TOGETHER),
        UPDATE.floor,
    ),
    Case(
        "mirror-local",
        "a 512 MiB blob that the node has, over loopback to curl, against nginx; manifests",
        functools.partial(mirror.local, 512 * MIB),
        (
            Limit("of_nginx_rate", 0.6, at_least=True),
            Limit("of_nginx_cpu", 4.0),
            Limit("manifests_per_s", 2000, at_least=True),
            Limit("manifest_errors", 0),
        ),
    ),
    Case(
        "mirror-peer",
        "first byte of each of nine 16 MiB layers that one other host has, links 100 Mbit/s",
        functools.partial(mirror.from_peer, 100),
        (Limit("beyond_piece_s", 0.1), Limit("copies", 0)),
    ),
    Case(
        "mirror-1000",
        "1,000 clients at once on one 100 MiB blob of one mirror",
        functools.partial(mirror.crowd, 1000, 100 * MIB),
        (Limit("copies", 1.0), Limit("errors", 0), Limit("most_resident_mib", 512)),
    ),
    *(
        Case(f"part-{name}", f"python -m tests.benchmarks.{name}", functools.partial(parts.measure, name))
        for name in parts.found()
    ),
)


def measure(case: Case, runs: int) -> Result:
    """Run a case; a run that fails ends it, with the reason."""
    measured: list[Run] = []
    failure = ""
    for seed in range(FIRST_SEED, FIRST_SEED + runs):
        try:
            measured.append(case.measure(seed))
        except FAILURES as error:
            failure = str(error).strip().replace("\n", " ")[-600:]
            break
        gc.collect()
    return Result(case.name, case.title, case.limits, case.floor, tuple(measured), failure)


def choose(names: Sequence[str]) -> list[Case]:
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no such case: {', '.join(unknown)}; --list shows them")
    return [known[name] for name in names] if names else list(CASES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", nargs="*", help="cases to run (default: all)")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="measure each N times, show medians (default 1)")
    parser.add_argument("--list", action="store_true", help="show the cases and end")
    parser.add_argument(
        "--json", type=Path, default=Path("results"), metavar="DIR", help="where raw results go (default results)"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of an earlier run and end")
    return parser.parse_args()


def _unwind(number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends in order, so that no daemon or namespace stays; a second one must not cut that short."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    arguments = _arguments()
    if arguments.show is not None:
        print(table(read(arguments.show)))
        return 0
    cases = choose(arguments.case)
    if arguments.list:
        for case in cases:
            print(f"{case.name:20} {case.title}{'; ' if case.limits else ''}{', '.join(map(str, case.limits))}")
        return 0
    if os.geteuid() != 0:
        raise SystemExit("hosts are network namespaces: run as root")
    signal.signal(signal.SIGTERM, _unwind)
    facts = {**machine(), "hosts_directory": str(hosts_dir()), "disk_directory": str(one.disk_dir())}
    results = []
    for case in cases:
        print(f"{case.name}: {case.title} ...", file=sys.stderr, flush=True)
        results.append(measure(case, max(1, arguments.runs)))
        print(f"  {' | '.join(cell for cell in row(results[-1])[1:] if cell)}", file=sys.stderr, flush=True)
        # After each case, so that an interrupted run leaves what it found.
        path = write(results, arguments.json, facts)
    print(table(results))
    print(f"\nraw results: {path}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
