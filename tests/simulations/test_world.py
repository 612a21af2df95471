"""Whole swarms under a virtual clock: the same each time, one copy, and what liars, deaths and pauses cost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import structlog

from simulations import misbehaving
from simulations.clock import run
from simulations.register import Register
from simulations.world import MBIT, SLOW_SECONDS, STALL_SECONDS, Node, OriginReading, Outcome, Shape, SimulatedOrigin, World
from swarm.download.policy import Policy
from swarm.edges import OriginInfo, Source
from swarm.errors import OriginUnreachable
from swarm.task import MIB


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Rendering a line for every refused dial would be most of a run."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


SHAPE = Shape(nodes=8, length=6 * MIB, origin_rate=50 * MBIT, node_rate=50 * MBIT, by_digest=True)


def simulate(
    shape: Shape,
    *,
    kinds: dict[int, type[Node]] | None = None,
    script: Callable[[World], None] | None = None,
    make: type[World] = World,
) -> tuple[Outcome, World]:
    async def main() -> tuple[Outcome, World]:
        world = make(shape, kinds=kinds)
        register = Register(Random(shape.seed))
        return await world.run(lambda node, _: register.for_node(node), script=script), world

    return run(main, shape.seed)


def told(shape: Shape) -> list[object]:
    """Everything that a run shows, in numbers."""
    outcome, world = simulate(shape)
    per_node = [
        [total.bytes_from_peers, total.bytes_from_origin, total.bytes_to_peers, total.pieces_wasted, node.uplink.sent]
        for node in world.nodes
        for total in [node.service.totals]
    ]
    return [outcome.seconds, outcome.copies, outcome.frames, outcome.frame_bytes, world.events.happened, outcome.why, per_node]


# --- the same each time -----------------------------------------------------------------------------------------------

THIRTY = Shape(nodes=30, length=4 * MIB, origin_rate=100 * MBIT, node_rate=50 * MBIT, seed=7)


def test_one_seed_is_one_result_whatever_the_process_and_its_hashes() -> None:
    here = json.loads(json.dumps(told(THIRTY)))
    assert here == json.loads(json.dumps(told(THIRTY)))
    code = "import json; from tests.simulations.test_world import THIRTY, told; print(json.dumps(told(THIRTY)))"
    root = Path(__file__).parent.parent.parent
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        cwd=root, capture_output=True, check=True, timeout=100, text=True,
    )  # fmt: skip
    assert json.loads(there.stdout.splitlines()[-1]) == here


def test_another_seed_is_another_swarm() -> None:
    assert told(SHAPE) != told(replace(SHAPE, seed=2))


# --- what a swarm costs -----------------------------------------------------------------------------------------------


def test_many_that_start_at_once_cost_one_copy() -> None:
    outcome, _ = simulate(SHAPE)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    assert outcome.copies <= 1.05
    assert outcome.last <= 2.5 * outcome.floor


def test_newcomers_cost_no_second_copy() -> None:
    outcome, world = simulate(replace(SHAPE, apart=0.5))
    assert outcome.unfinished == 0
    assert outcome.copies <= 1.02
    assert world.nodes[-1].service.totals.bytes_from_origin == 0


def test_the_reasons_for_reading_add_up_to_what_was_read() -> None:
    outcome, world = simulate(SHAPE)
    assert sum(outcome.why.values()) == sum(node.service.totals.pieces_from_origin for node in world.nodes)
    assert set(outcome.why) <= {"rendezvous", "spare", "alone"}


def test_a_slow_node_holds_nobody_else_up() -> None:
    plain, _ = simulate(SHAPE)
    outcome, _ = simulate(replace(SHAPE, slow={0: 20.0}))
    assert outcome.unfinished == 0
    assert outcome.copies <= 1.1
    others = [seconds for number, seconds in outcome.by_node.items() if number != 0]
    assert max(others) <= plain.last + Policy().lease_first + Policy().stuck_holder, (
        "for the three pieces that were its to read"
    )


# --- deaths and pauses ------------------------------------------------------------------------------------------------


def test_when_a_third_dies_the_others_have_it_all_for_little_more() -> None:
    plain, _ = simulate(SHAPE)

    def script(world: World) -> None:
        for number, at in ((1, 0.3), (4, 0.6), (6, 0.9)):
            world.events.after(at, partial(world.kill, world.nodes[number]))

    outcome, _ = simulate(SHAPE, script=script)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    assert len(outcome.seconds) >= 5
    assert outcome.copies <= 1.3
    assert outcome.last <= 2.5 * plain.last


def test_the_last_one_alive_gets_the_rest_from_the_origin() -> None:
    def script(world: World) -> None:
        for node in world.nodes[1:]:
            world.events.after(0.6, partial(world.kill, node))

    outcome, world = simulate(SHAPE, script=script)
    assert outcome.unfinished == 0
    assert len(outcome.seconds) == 1
    assert world.nodes[0].service.totals.bytes_from_origin > 0.5 * SHAPE.length


@pytest.mark.parametrize("seconds", [20.0, 40.0])
def test_a_node_stopped_for_a_while_holds_nobody_up_and_goes_on_afterwards(seconds: float) -> None:
    """R31: its links outlive a stop of 20 s, and not one of 40 s."""
    shape = replace(SHAPE, length=24 * MIB)
    plain, _ = simulate(shape)

    def script(world: World) -> None:
        world.events.after(1.0, partial(world.stop, world.nodes[2], seconds))

    outcome, world = simulate(shape, script=script)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    stopped = outcome.by_node.pop(2)
    others = outcome.by_node.values()
    assert max(others) <= plain.last + STALL_SECONDS + Policy().stuck_holder, "what it was sending came from others"
    assert seconds < stopped < seconds + 3 * plain.last
    assert outcome.copies <= 1.25
    assert world.nodes[2].service.totals.bytes_from_peers > 0


# --- the origin -------------------------------------------------------------------------------------------------------


class Streams(SimulatedOrigin):
    """Says neither how long its content is nor serves ranges."""

    async def head(self, source: Source) -> OriginInfo:
        return replace(await super().head(source), length=None, ranges=False)


class NoRanges(SimulatedOrigin):
    async def head(self, source: Source) -> OriginInfo:
        return replace(await super().head(source), ranges=False)


class Gone(SimulatedOrigin):
    """Answers until node 0 has everything."""

    async def head(self, source: Source) -> OriginInfo:
        self._check()
        return await super().head(source)

    @asynccontextmanager
    async def read(self, *arguments: Any, **named: Any) -> AsyncIterator[OriginReading]:
        self._check()
        async with super().read(*arguments, **named) as body:
            yield body

    def _check(self) -> None:
        if any(entry.complete for entry in self._world.nodes[0].store.entries()):
            raise OriginUnreachable("the origin is gone")


@pytest.mark.parametrize("kind", [Streams, NoRanges])
@pytest.mark.parametrize("by_digest", [True, False])
def test_an_origin_without_ranges_is_read_by_one_node_and_the_others_wait(kind: type[SimulatedOrigin], by_digest: bool) -> None:
    class OneReader(World):
        def origin_for(self, node: Node) -> SimulatedOrigin:
            return kind(self, node)

    outcome, world = simulate(replace(SHAPE, by_digest=by_digest), make=OneReader)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    assert outcome.copies <= 1.05
    assert sum(node.service.totals.bytes_from_origin > 0 for node in world.nodes) == 1


@pytest.mark.parametrize("kind", [Streams, NoRanges])
def test_when_the_one_reader_dies_another_reads(kind: type[SimulatedOrigin]) -> None:
    class OneReader(World):
        def origin_for(self, node: Node) -> SimulatedOrigin:
            return kind(self, node)

    def script(world: World) -> None:
        def kill_reader() -> None:
            world.kill(max(world.nodes, key=lambda node: node.downlink._free_at))

        world.events.after(0.7, kill_reader)

    outcome, world = simulate(SHAPE, make=OneReader, script=script)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    assert outcome.copies <= 2.05
    assert sum(node.alive for node in world.nodes) == SHAPE.nodes - 1


def test_when_the_origin_is_gone_the_swarm_goes_on_from_its_one_copy() -> None:
    class OneCopy(World):
        def origin_for(self, node: Node) -> SimulatedOrigin:
            return Gone(self, node)

    outcome, world = simulate(replace(SHAPE, apart=2.0), make=OneCopy)
    assert (outcome.unfinished, outcome.errors) == (0, [])
    assert all(node.service.totals.bytes_from_origin == 0 for node in world.nodes[2:])


# --- liars ------------------------------------------------------------------------------------------------------------

COSTS: dict[type[Node], tuple[float, float]] = {
    misbehaving.Flipper: (1.1, 3),
    misbehaving.Liar: (3.2, 6),
    misbehaving.Silent: (1.1, 9),
    misbehaving.Dripper: (1.25, 2 * SLOW_SECONDS),
    misbehaving.Boaster: (1.1, 4),
    misbehaving.Refuser: (1.1, 2),
    misbehaving.Oscillator: (1.1, 3),
    misbehaving.WrongBitmap: (1.1, 2),
    misbehaving.Claimer: (1.1, 2 * Policy().strikes * (Policy().lease_first + Policy().lease_slack)),
}
"""Most copies that the honest may read, and most seconds that the last of them may lose.  Copies: with signed lies each honest
node reads a sample of each signer, a third of such small content.  Seconds: a wait before silence is doubted, all leases that
two may waste, or two transfers that are given up."""


@pytest.mark.parametrize("kind", COSTS)
def test_the_honest_have_the_right_content_whatever_two_others_do(kind: type[Node]) -> None:
    plain, _ = simulate(SHAPE)
    outcome, world = simulate(SHAPE, kinds={2: kind, 5: kind})
    honest = [node for node in world.nodes if not isinstance(node, kind)]
    assert outcome.errors == []
    assert {node.number for node in honest} <= outcome.by_node.keys(), (
        "each has the right content: it is asked for by its digest"
    )
    copies, seconds = COSTS[kind]
    assert sum(node.service.totals.bytes_from_origin for node in honest) <= copies * SHAPE.length
    assert max(outcome.by_node[node.number] for node in honest) <= plain.last + seconds


def test_with_three_liars_of_ten_the_honest_have_it_exactly_for_a_third_more_bytes() -> None:
    """R19: wrong bytes, signed lies and boasts at once."""
    shape = replace(SHAPE, nodes=10, length=24 * MIB)
    liars: dict[int, type[Node]] = {1: misbehaving.Flipper, 4: misbehaving.Liar, 7: misbehaving.Boaster}
    outcome, world = simulate(shape, kinds=liars)
    sent = world.origin_uplink.sent + sum(node.uplink.sent for node in world.nodes)
    honest = [node for node in world.nodes if node.number not in liars]
    assert outcome.errors == []
    assert {node.number for node in honest} <= outcome.by_node.keys()
    assert sent <= 1.35 * shape.nodes * shape.length
    for node in honest:
        assert node.service.totals.pieces_bad == 1, "the first wrong piece was the last"
        assert node.service.totals.bans == 2, "one for wrong bytes, and one for signed lies"
