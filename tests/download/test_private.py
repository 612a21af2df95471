"""Content that needed credentials: who learns of it, who gets it, and over what (SECURITY: T19)."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from swarm import wire
from swarm.download.service import COMPANY_SECONDS
from swarm.edges import FileSlice, Source, State
from swarm.task import Task, blob_task, url_task
from tests.download.scene import URL, Scene, play, runs

COUNT = 8
CREDENTIALS = (("Authorization", "Bearer canary"),)
SECRET_SOURCES = {
    "a credential": Source(URL, CREDENTIALS),
    "a cookie": Source(URL, (("cookie", "session=canary"),)),
    "a header nobody knows": Source(URL, (("X-Registry-Auth", "canary"),)),
    "a user in the URL": Source("http://user:canary@origin.example/file"),
    "a file of this machine": Source("file:///srv/secret"),
}


def unshared(scene: Scene, source: Source) -> Task:
    return url_task(source.url, validator=scene.origin.validator, shared=False)


def ask_for(scene: Scene, task: Task, *, encrypted: bool, private: bool | None = None) -> int | str:
    """What a member gets that asks for the first piece, after joining with the content as private or public."""
    peer, geometry = scene.peer(), scene.content.geometry
    if private is not None:
        peer.say(wire.Join(task.id, geometry.length, geometry.piece_length, held=bytes(1), private=private))
    served = scene.service.serve(
        peer.node_id, wire.Request(1, task.id, 0, 0, scene.content.geometry.size(0)), encrypted=encrypted
    )
    if isinstance(served, int):
        return served
    assert isinstance(served.body, FileSlice)
    served.body.release()
    return "served"


@pytest.mark.parametrize("kind", SECRET_SOURCES)
@pytest.mark.parametrize("by_digest", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_what_needed_credentials_is_announced_to_nobody_and_sent_to_nobody(kind: str, by_digest: bool, is_open: bool) -> None:
    async def script(scene: Scene) -> None:
        source = SECRET_SOURCES[kind]
        if not by_digest:
            scene.task = unshared(scene, source)
        peer = scene.peer().takes_part()
        scene.discovery.members = [scene.provider(scene.peer(linked=False))]
        fetch = scene.fetch(scene.request(source=source))
        await trio.sleep(0.2)
        assert fetch.fetched is None, "it runs"
        spies(scene)
        fetched = await fetch.outcome()
        assert fetched.why_origin == {"unshared": COUNT}
        spies(scene)
        assert scene.dialled == []
        assert scene.discovery.log == []
        assert not [message for message in peer.posted if not isinstance(message, wire.Leave)]

    play(script, is_open=is_open)


def spies(scene: Scene) -> None:
    """A member that knows the task gets nothing out of us."""
    spy = scene.peer()
    geometry = scene.content.geometry
    spy.say(wire.Ask(scene.task.id))
    spy.say(wire.Join(scene.task.id, geometry.length, geometry.piece_length, complete=True, reply=True))
    assert spy.posted == [wire.Leave(scene.task.id)] * 2
    spy.say(wire.Claims(scene.task.id, [spy.claim(piece, lease=120.0) for piece in range(COUNT)]))
    for encrypted in (True, False):
        assert ask_for(scene, scene.task, encrypted=encrypted) in (wire.REFUSED, wire.NOT_HELD)
    assert spy.asked == []
    spy.hang_up()


async def shared_privately(scene: Scene, **more: Any) -> None:
    """Fetch with credentials, and share."""
    fetch = scene.fetch(scene.request(source=Source(URL, CREDENTIALS), share=True, **more))
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes


@runs(is_open=False)
async def test_what_needed_credentials_and_is_shared_travels_encrypted_only(scene: Scene) -> None:
    await shared_privately(scene)
    assert scene.discovery.announced[scene.task.id] is State.COMPLETE
    assert ask_for(scene, scene.task, encrypted=False, private=True) == wire.REFUSED
    assert ask_for(scene, scene.task, encrypted=True, private=True) == "served"


@runs(is_open=False)
async def test_a_node_that_takes_private_content_for_public_gets_none_of_it(scene: Scene) -> None:
    """It checked no right, so it would give the content to whoever asks; where all pieces are encrypted, too."""
    await shared_privately(scene)
    assert ask_for(scene, scene.task, encrypted=True, private=False) == wire.REFUSED
    assert ask_for(scene, scene.task, encrypted=True) == wire.REFUSED


@runs(is_open=False)
async def test_a_node_that_changes_its_mind_about_private_content_gets_no_more_of_it(scene: Scene) -> None:
    await shared_privately(scene)
    task, geometry = scene.task, scene.content.geometry
    for last in (wire.Join(task.id, geometry.length, geometry.piece_length, held=bytes(1)), wire.Leave(task.id)):
        peer = scene.peer()
        peer.say(wire.Join(task.id, geometry.length, geometry.piece_length, held=bytes(1), private=True), last)
        asked = wire.Request(1, task.id, 0, 0, geometry.size(0))
        assert scene.service.serve(peer.node_id, asked, encrypted=True) == wire.REFUSED


@runs(is_open=False)
async def test_what_was_shared_privately_is_still_there_for_those_with_a_right_after_its_download(scene: Scene) -> None:
    await shared_privately(scene, digest=scene.content.digest)
    await trio.sleep(2 * COMPANY_SECONDS)
    assert not scene.service.activity()
    assert scene.discovery.announced[scene.task.id] is State.COMPLETE, "others that come later find it"
    assert ask_for(scene, scene.task, encrypted=True, private=False) == wire.REFUSED
    assert ask_for(scene, scene.task, encrypted=False, private=True) == wire.REFUSED
    assert ask_for(scene, scene.task, encrypted=True, private=True) == "served"


@runs(is_open=False)
async def test_what_one_user_alone_may_read_goes_to_nobody_who_calls_it_private_by_its_digest(scene: Scene) -> None:
    """Private under the URL it was fetched from, and not shared: its digest is no way around that."""
    url = scene.as_url()
    fetch = scene.fetch(scene.request(source=Source(URL, CREDENTIALS)))
    await fetch.outcome()
    assert url.id not in scene.discovery.announced
    scene.task = blob_task(scene.content.digest)
    await trio.sleep(2 * COMPANY_SECONDS)
    with scene.store.open(scene.task.id) as found:  # type: ignore[union-attr]
        assert found.complete, "it is here, by its digest too"
    for private in (True, False):
        assert ask_for(scene, scene.task, encrypted=True, private=private) == wire.NOT_HELD


@runs(is_open=False)
async def test_what_needed_credentials_is_asked_of_others_encrypted_only(scene: Scene) -> None:
    holder = scene.peer().takes_part().serves(scene.content)
    await shared_privately(scene, no_origin=True)
    assert holder.asked
    assert all(asked.private for asked in holder.asked)


@runs(is_open=True)
async def test_in_an_open_network_credentials_keep_content_from_everybody_whatever_its_requester_says(scene: Scene) -> None:
    await shared_privately(scene)
    assert scene.discovery.log == []
    spies(scene)


@runs(is_open=False)
async def test_one_requesters_credentials_do_not_open_a_download_that_others_take_part_in(scene: Scene) -> None:
    """Somebody without an origin waits for the swarm; somebody else's credentials must not feed it."""
    waiting = scene.fetch(scene.request(no_origin=True))
    peer = scene.peer().takes_part([0]).serves(scene.content)
    await trio.sleep(1)
    assert peer.told(wire.Ask)
    peer.join([0])
    await trio.sleep(1)
    own = scene.fetch(scene.request(source=Source(URL, CREDENTIALS)))
    await trio.sleep(5)
    assert scene.origin.reads == []
    peer.hang_up()
    for fetch in (waiting, own):
        fetch.scope.cancel()
    await trio.sleep(1)


@runs(is_open=False)
async def test_a_join_that_calls_a_task_private_does_not_make_us_share_ours(scene: Scene) -> None:
    scene.task = unshared(scene, Source(URL, CREDENTIALS))
    fetch = scene.fetch(scene.request(source=Source(URL, CREDENTIALS)))
    await trio.sleep(0.2)
    peer = scene.peer()
    geometry = scene.content.geometry
    peer.say(wire.Join(scene.task.id, geometry.length, geometry.piece_length, held=bytes([0]), private=True, reply=True))
    await fetch.outcome()
    assert peer.posted == [wire.Leave(scene.task.id)]


@runs(is_open=False)
async def test_content_without_anything_to_tell_its_versions_apart_is_not_shared(scene: Scene) -> None:
    scene.origin.validator = ""
    await scene.fetch(scene.request(digest=None)).outcome()
    assert scene.discovery.log == []


@runs(is_open=False)
async def test_headers_that_everybody_may_send_do_not_make_content_private(scene: Scene) -> None:
    source = Source(URL, (("User-Agent", "curl"), ("Accept", "*/*")))
    await scene.fetch(scene.request(source=source)).outcome()
    assert scene.discovery.announced[scene.task.id] is State.COMPLETE
    assert ask_for(scene, scene.task, encrypted=False) == "served"
