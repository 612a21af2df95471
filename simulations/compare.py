"""What one number of the policy is worth: the same simulated swarm with and without a change, side by side.

    python -m simulations.compare [--nodes N] [--mib N] [--origin MBIT] [--node MBIT] [--arrival S] [--kill SHARE] [--seeds N]
                                  [--json] [CHANGE]...

A CHANGE is `field=value` of `download.policy.Policy`, or `module:NAME=value` for a number that stands in a module
(`swarm.peer.upload:SPARE_RANK=0`); several joined by commas are made together.  The first row is the swarm as it is.

The world is `simulations.world`, discovery is `simulations.register`: no processor, no TCP, no disk.  Each row is run with
the seeds 1, 2, ...; the means are shown, and of the time of the last node the worst too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from random import Random

from simulations.clock import run
from simulations.register import Register
from simulations.world import MBIT, Outcome, Shape, World
from swarm import logs
from swarm.download.policy import Policy

MIB = 1024 * 1024
KILLED_BETWEEN = (0.1, 0.7)
"""When nodes die, in floors after the start."""


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the seeds.

    Attributes:
        copies: Bytes out of the origin over the length of the content.
        last, worst: Time of the last node over the floor: mean and worst seed.
        median: Time of the median node over the floor.
        frames: Control frames per node.
        wasted: Share of the pieces from peers that came although they were held already.
        unfinished: Nodes alive at the end without the content, all seeds together.
    """

    change: str
    copies: float
    last: float
    worst: float
    median: float
    frames: float
    wasted: float
    unfinished: int


@contextlib.contextmanager
def changed(change: str) -> Iterator[Policy]:
    """The policy with this change; numbers of modules are put back at the end.

    Raises:
        ValueError: There is no such number.
    """
    policy = Policy()
    known = {item.name for item in fields(Policy)}
    with contextlib.ExitStack() as undo:
        for part in filter(None, change.split(",")):
            name, _, text = part.partition("=")
            value = ast.literal_eval(text)
            if ":" in name:
                module_name, _, constant = name.partition(":")
                module = importlib.import_module(module_name)
                undo.callback(setattr, module, constant, getattr(module, constant))
                setattr(module, constant, value)
            elif name in known:
                policy = replace(policy, **{name: value})
            else:
                raise ValueError(f"no such number: {name}; Policy has {', '.join(sorted(known))}")
        yield policy


def simulate(shape: Shape, policy: Policy, kill: float = 0.0) -> tuple[Outcome, float]:
    """One run; its outcome, and the share of pieces from peers that were wasted."""

    async def main() -> tuple[Outcome, float]:
        world = World(shape, policy=policy)
        register = Register(Random(shape.seed))
        outcome = await world.run(lambda node, _: register.for_node(node), script=partial(_kill, share=kill))
        totals = [node.service.totals for node in world.nodes]
        useful = sum(total.pieces_from_peers for total in totals)
        return outcome, sum(total.pieces_wasted for total in totals) / max(1, useful)

    return run(main, shape.seed)


def _kill(world: World, share: float) -> None:
    floor = world.shape.length / min(world.shape.origin_rate, world.shape.node_rate)
    for node in world.rng.sample(world.nodes, round(share * len(world.nodes))):
        world.events.after(world.rng.uniform(*KILLED_BETWEEN) * floor, partial(world.kill, node))


def compare(shape: Shape, change: str, seeds: int, kill: float = 0.0) -> Row:
    """One row."""
    with changed(change) as policy:
        runs = [simulate(replace(shape, seed=seed), policy, kill) for seed in range(1, seeds + 1)]
    outcomes = [outcome for outcome, _ in runs]
    last = [outcome.last / outcome.floor for outcome in outcomes]
    return Row(
        change or "as it is",
        statistics.fmean(outcome.copies for outcome in outcomes),
        statistics.fmean(last),
        max(last),
        statistics.fmean(outcome.percentile(0.5) / outcome.floor for outcome in outcomes),
        statistics.fmean(outcome.frames / shape.nodes for outcome in outcomes),
        statistics.fmean(wasted for _, wasted in runs),
        sum(outcome.unfinished for outcome in outcomes),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m simulations.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=40)
    parser.add_argument("--mib", type=float, default=32, help="length of the content")
    parser.add_argument("--origin", type=float, default=200, help="Mbit/s of the origin")
    parser.add_argument("--node", type=float, default=50, help="Mbit/s of each node, both ways")
    parser.add_argument("--arrival", type=float, default=0.05, help="seconds over which the nodes start")
    parser.add_argument("--kill", type=float, default=0.0, help="share of the nodes that die on the way")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("change", nargs="*")
    given = parser.parse_args(arguments)
    shape = Shape(given.nodes, round(given.mib * MIB), given.origin * MBIT, given.node * MBIT, given.arrival)
    logs.configure("warning", "text")
    if not given.json:
        print(f"{'':44}{'copies':>8}{'last':>8}{'worst':>8}{'median':>8}{'frames':>8}{'wasted':>8}")
    for change in ("", *given.change):
        row = compare(shape, change, given.seeds, given.kill)
        print(json.dumps(asdict(row)) if given.json else _line(row), flush=True)


def _line(row: Row) -> str:
    line = f"{row.change:44}{row.copies:8.3f}{row.last:8.2f}{row.worst:8.2f}{row.median:8.2f}{row.frames:8.0f}{row.wasted:8.1%}"
    return line + (f"  {row.unfinished} unfinished" if row.unfinished else "")


if __name__ == "__main__":
    main()
