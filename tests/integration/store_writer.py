"""Forks a process for each line it reads; that process writes pieces into a store until it is done or killed.

One warm parent, because starting Python takes longer than what the child is to be killed in.  Lines out:
``pid N``, ``piece N`` after each piece was written, ``complete``, and ``ended`` when the child is gone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from tests.store.material import Material, create, disk_store, write

PIECE_BYTES = 16 * 1024
PIECES = 256


def material() -> Material:
    return Material(PIECES * PIECE_BYTES - 7, PIECE_BYTES)


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


async def fill(path: Path, pause: float, content: Material) -> None:
    with disk_store(path) as store, await create(store, content.blob, content) as task:
        for piece in [piece for piece in range(PIECES) if not task.held[piece]]:
            write(task, content, piece)
            say(f"piece {piece}")
            await trio.sleep(pause)
        await task.complete_with(await task.content_digest())
        say("complete")


def main() -> None:
    content = material()
    for line in sys.stdin:
        path, pause = line.split()
        pid = os.fork()
        if pid == 0:
            trio.run(fill, Path(path), float(pause), content)
            os._exit(0)
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
