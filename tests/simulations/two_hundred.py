"""`python -m tests.simulations.two_hundred [SEED]`: 200 nodes want one file at once; prints what came of it as JSON.

The DHT, the announcements and the downloads are the real ones; hosts, links and the origin are modelled.
"""

from __future__ import annotations

import json
import logging
import sys

import structlog

from simulations.clock import run
from simulations.overlay import Overlay
from simulations.world import MBIT, Outcome, Shape, World
from swarm.task import MIB

NODES = 200
BEFORE = 10.0
"""Seconds in which the nodes find one another."""


def simulate(seed: int) -> Outcome:
    shape = Shape(NODES, 32 * MIB, origin_rate=200 * MBIT, node_rate=50 * MBIT, seed=seed)

    async def main() -> Outcome:
        world = World(shape)
        return await world.run(Overlay(world).for_node, before=BEFORE)

    return run(main, seed)


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    outcome = simulate(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    shown = {
        "copies": outcome.copies,
        "p99": outcome.percentile(0.99) / outcome.floor,
        "last": outcome.last / outcome.floor,
        "finished": len(outcome.seconds),
        "unfinished": outcome.unfinished,
        "errors": outcome.errors,
        "frames": outcome.frames,
        "frame_bytes": outcome.frame_bytes,
        "why": outcome.why,
        "seconds": outcome.by_node,
    }
    print(json.dumps(shown, sort_keys=True))


if __name__ == "__main__":
    main()
