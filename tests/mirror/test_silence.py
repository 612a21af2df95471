"""A registry that takes connections and never answers costs one wait, not one for each thing that a pull asks."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from swarm.config import MirrorSettings, RegistrySettings
from swarm.errors import OriginUnreachable
from swarm.mirror.authorize import Authorizer
from swarm.mirror.paths import Name
from swarm.mirror.registry import SILENT_SECONDS, Registries
from swarm.origin.answers import Answer
from swarm.task import Digest

NAME = Name("registry.example", "a/b")
DIGEST = Digest("sha256", "a" * 64)


class Silent:
    """An origin that never answers, until it does."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers = False

    async def ask(self, *_: Any, **__: Any) -> Answer:
        self.asked += 1
        if not self.answers:
            await trio.sleep_forever()
        return Answer(200, {"docker-content-digest": str(DIGEST), "content-type": "a/b", "content-length": "5"})


def test_a_silent_registry_costs_one_wait_a_pull() -> None:
    async def main() -> None:
        origin = Silent()
        settings = MirrorSettings(registry=((NAME.registry, RegistrySettings()),), registry_timeout=5.0)
        registries = Registries(settings, origin)  # type: ignore[arg-type]  # nothing else of it is used
        rights = Authorizer(registries, lambda _digest: None)
        began = trio.current_time()
        with pytest.raises(OriginUnreachable, match="no answer within 5 s"):
            await registries.head_manifest(NAME, "v1", None)
        for _ in range(5):
            assert not (await rights.check(NAME, DIGEST, None)).private
        assert trio.current_time() - began == pytest.approx(5.0)
        assert origin.asked == 1
        origin.answers = True
        await trio.sleep(SILENT_SECONDS)
        assert (await registries.head_manifest(NAME, "v1", None)).digest == DIGEST

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
