"""Fetches end to end in one node: faults of origin, peers and disk, sharing, ranges, resuming, draining."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest
import trio

from swarm import wire
from swarm.download.claims import score
from swarm.download.exchange import Exchange
from swarm.download.request import FetchRequest
from swarm.download.service import COMPANY_SECONDS, GIVE_UP_AFTER, IDLE_SECONDS
from swarm.download.unknown_length import MAX_READERS, READER_PATIENCE
from swarm.edges import Source, State
from swarm.errors import ContentChanged, Interrupted, LocalProtocolError, NoSpace, NotPermitted, OriginUnreachable
from swarm.store.memory import MemoryStore
from swarm.task import MIN_PIECE_BYTES, blob_task
from tests.download.scene import POLICY, URL, Content, Peer, Scene, play, runs

COUNT = 8
OTHER = Content(COUNT, seed=2)

# --- the way of a fetch -----------------------------------------------------------------------------------------------


@runs()
async def test_a_fetch_alone_costs_one_copy_and_says_why_it_read(scene: Scene) -> None:
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    length = scene.content.geometry.length
    assert fetch.bytes == scene.content.bytes
    assert (fetched.from_origin, fetched.from_peers, fetched.from_local) == (length, 0, 0)
    assert fetched.why_origin == {"alone": COUNT}
    assert scene.service.totals.why_origin == {"alone": COUNT}
    assert scene.origin.sent == scene.service.totals.bytes_from_origin == length
    assert scene.service.activity()[0].why_origin == {"alone": COUNT}


@runs()
async def test_everything_is_announced_before_it_is_looked_for_and_when_it_is_complete(scene: Scene) -> None:
    await scene.fetch().outcome()
    assert scene.discovery.log[0] == ("wants", scene.task.id)
    assert scene.discovery.log[-1] == ("complete", scene.task.id)
    assert scene.discovery.announced == {scene.task.id: State.COMPLETE}


@runs()
async def test_content_that_is_here_costs_nothing(scene: Scene) -> None:
    await scene.fetch().outcome()
    heads, reads = scene.origin.heads, len(scene.origin.reads)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.from_local == fetched.length
    assert (scene.origin.heads, len(scene.origin.reads)) == (heads, reads)


@runs()
async def test_progress_only_grows_and_ends_with_done(scene: Scene) -> None:
    fetch = scene.fetch()
    await fetch.outcome()
    done = [each.done for each in fetch.progress]
    assert done == sorted(done)
    assert [fetch.progress[0].phase, fetch.progress[-1].phase] == ["resolving", "done"]
    assert done[-1] == scene.content.geometry.length


@runs()
async def test_of_a_url_that_never_changes_and_whose_length_is_known_nothing_is_asked(scene: Scene) -> None:
    fetch = scene.fetch(FetchRequest(Source(URL), immutable=True, length=scene.content.geometry.length))
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert scene.origin.heads == 0


@runs(count=0)
async def test_empty_content_is_complete_at_once(scene: Scene) -> None:
    fetch = scene.fetch()
    await fetch.outcome()
    assert fetch.bytes == b""
    assert scene.origin.reads == []


@runs()
async def test_members_of_one_node_share_one_download(scene: Scene) -> None:
    fetches = [scene.fetch() for _ in range(5)]
    await trio.sleep(0.1)
    fetches += [scene.fetch() for _ in range(5)]
    for fetch in fetches:
        await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
    assert scene.origin.sent == scene.content.geometry.length


@runs()
async def test_one_who_stops_waiting_leaves_the_download_to_the_others(scene: Scene) -> None:
    first, second = scene.fetch(), scene.fetch()
    await trio.sleep(0.25)
    assert 0 < scene.origin.sent < scene.content.geometry.length
    first.scope.cancel()
    await second.outcome()
    assert second.bytes == scene.content.bytes
    assert scene.origin.sent == scene.content.geometry.length


@runs()
async def test_one_who_stops_while_it_asks_for_all_leaves_it_to_the_next(scene: Scene) -> None:
    """SECURITY R29: the first asks the origin for everybody."""
    first, second = scene.fetch(), scene.fetch()
    await trio.sleep(0.005)
    assert scene.origin.heads == 1, "the first asks, the second waits for it"
    first.scope.cancel()
    await second.outcome()
    assert second.bytes == scene.content.bytes


@runs()
async def test_when_nobody_waits_any_more_the_download_stops_and_what_was_verified_is_kept(scene: Scene) -> None:
    fetch = scene.fetch()
    peer = scene.peer().takes_part([])
    await trio.sleep(0.5)
    assert scene.held()
    fetch.scope.cancel()
    await trio.sleep(0.1)
    reads, kept = len(scene.origin.reads), scene.held()
    await trio.sleep(10)
    assert len(scene.origin.reads) == reads
    assert scene.discovery.announced == {}, "it was withdrawn"
    assert not [entry for entry in scene.store.entries() if entry.in_use]
    assert not peer.posted or isinstance(peer.posted[-1], wire.Leave)
    fetched = await scene.fetch().outcome()
    assert fetched.from_local == sum(map(scene.content.geometry.size, kept))
    assert fetched.from_origin == fetched.length - fetched.from_local


@runs()
async def test_a_bug_in_one_task_costs_this_task_and_not_the_node(scene: Scene) -> None:
    def breaks(exchange: Exchange, *_: object) -> None:
        if exchange.task_id == scene.task.id:
            raise KeyError("a bug")

    peer = scene.peer().takes_part([])
    fetch = scene.fetch()
    await trio.sleep(0.15)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "tick", breaks)
        with pytest.raises(LocalProtocolError, match="internal error"):
            await fetch.outcome()
    assert peer.up
    again = scene.fetch()
    await again.outcome()
    assert again.bytes == scene.content.bytes


# --- ranges -----------------------------------------------------------------------------------------------------------


@runs()
async def test_a_range_costs_the_pieces_it_needs_and_no_others(scene: Scene) -> None:
    fetched = await scene.fetch(scene.request(byte_range=(MIN_PIECE_BYTES + 5, 3 * MIN_PIECE_BYTES))).outcome()
    assert scene.held() == [1, 2]
    assert fetched.from_origin == 2 * MIN_PIECE_BYTES
    assert fetched.digest is None
    assert scene.discovery.announced.get(scene.task.id) is not State.COMPLETE


@runs()
async def test_a_range_is_asked_of_peers_as_these_pieces_only(scene: Scene) -> None:
    peer = scene.peer().takes_part().serves(scene.content)
    await scene.fetch(scene.request(no_origin=True, byte_range=(MIN_PIECE_BYTES, 2 * MIN_PIECE_BYTES + 1))).outcome()
    assert sorted(peer.pieces_asked) == [1, 2]


@runs()
async def test_everything_after_a_range_reads_only_the_rest(scene: Scene) -> None:
    await scene.fetch(scene.request(byte_range=(0, 10))).outcome()
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert scene.origin.sent == scene.content.geometry.length
    assert fetched.digest == scene.content.digest


@runs()
async def test_who_wants_everything_widens_a_running_range(scene: Scene) -> None:
    ranged = scene.fetch(scene.request(byte_range=(0, 4 * MIN_PIECE_BYTES)))
    await trio.sleep(0.15)
    whole = scene.fetch()
    await ranged.outcome()
    await whole.outcome()
    assert whole.bytes == scene.content.bytes
    assert scene.origin.sent == scene.content.geometry.length


# --- the origin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("by_digest", [True, False])
def test_an_origin_without_ranges_is_read_once(told: bool, by_digest: bool) -> None:
    async def script(scene: Scene) -> None:
        scene.origin.serves_ranges = False
        scene.origin.knows_ranges = told
        fetch = scene.fetch() if by_digest else scene.fetch(FetchRequest(Source(URL)))
        fetched = await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        # Where nobody knows, the first two pieces are read to find out; the second comes with the first before it.
        assert scene.origin.sent == fetched.length + (0 if told else 3 * MIN_PIECE_BYTES)
        assert len(scene.origin.reads) == (1 if told else 3)

    play(script)


@pytest.mark.parametrize("by_digest", [True, False])
@pytest.mark.parametrize("count", [0, 1, COUNT])
def test_content_of_unknown_length_is_read_once_and_then_a_task_like_any_other(by_digest: bool, count: int) -> None:
    async def script(scene: Scene) -> None:
        scene.origin.tells_length = scene.origin.serves_ranges = False
        fetch = scene.fetch() if by_digest else scene.fetch(FetchRequest(Source(URL)))
        fetched = await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        assert (fetched.length, fetched.digest) == (len(scene.content.bytes), scene.content.digest)
        assert len(scene.origin.reads) == 1
        assert sum(fetched.why_origin.values()) == count
        assert set(fetched.why_origin) <= {"stream"}

    play(script, content=Content(count))


@runs()
async def test_a_new_version_in_the_middle_is_one_clean_restart_as_another_task(scene: Scene) -> None:
    fetch = scene.fetch(FetchRequest(Source(URL)))
    old = scene.as_url()
    await trio.sleep(0.25)
    assert 0 < len(scene.held()) < COUNT
    scene.origin.content, scene.origin.validator = OTHER, "etag:2"
    fetched = await fetch.outcome()
    assert fetch.bytes == OTHER.bytes
    assert fetched.task_id == scene.as_url().id != old.id
    assert fetched.from_origin == fetched.length, "no byte of the old one"
    assert scene.origin.heads == 2


@runs()
async def test_content_that_changes_again_and_again_ends_in_an_error(scene: Scene) -> None:
    fetch = scene.fetch(FetchRequest(Source(URL)))
    versions = 1
    while not fetch.done.is_set():
        await trio.sleep(0.25)
        versions += 1
        scene.origin.validator = f"etag:{versions}"
    with pytest.raises(ContentChanged):
        await fetch.outcome()
    assert scene.origin.heads == 2


@runs()
async def test_an_origin_that_fails_in_the_middle_leaves_the_rest_to_peers(scene: Scene) -> None:
    scene.origin.stops_after, scene.origin.error = 3 * MIN_PIECE_BYTES, OriginUnreachable("it went down")
    scene.origin.seconds_a_piece = 1.0
    peer = scene.peer().takes_part([]).serves(scene.content)
    fetch = scene.fetch()
    await trio.sleep(GIVE_UP_AFTER / 2)
    assert 0 < len(scene.held()) < COUNT
    peer.say(wire.Have(scene.task.id, list(range(COUNT))))
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.from_origin > 0
    assert fetched.from_peers > 0


@runs()
async def test_an_answer_that_breaks_off_is_gone_on_with_where_it_stopped(scene: Scene) -> None:
    scene.origin.breaks_at = MIN_PIECE_BYTES // 2
    await scene.fetch(scene.request(byte_range=(0, 10))).outcome()
    assert scene.origin.sent == MIN_PIECE_BYTES
    assert scene.origin.reads == [(0, MIN_PIECE_BYTES), (MIN_PIECE_BYTES // 2, MIN_PIECE_BYTES)]


@runs()
async def test_with_the_origin_gone_peers_are_enough(scene: Scene) -> None:
    scene.origin.error = OriginUnreachable("it is down")
    scene.peer().takes_part().serves(scene.content)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.from_peers == fetched.length


@runs()
async def test_with_the_origin_gone_and_not_enough_at_peers_the_origins_error_says_so(scene: Scene) -> None:
    scene.origin.error = OriginUnreachable("the origin is down")
    scene.peer().takes_part([0, 1], reads=False).serves(scene.content)
    fetch = scene.fetch()
    with pytest.raises(OriginUnreachable, match="the origin is down"):
        await fetch.outcome()
    assert trio.current_time() < 3 * GIVE_UP_AFTER
    assert scene.held() == [0, 1]
    assert scene.discovery.announced == {}


@runs()
async def test_without_an_origin_and_not_enough_at_peers_the_error_says_that(scene: Scene) -> None:
    scene.peer().takes_part([0, 1]).serves(scene.content)
    fetch = scene.fetch(scene.request(no_origin=True))
    with pytest.raises(OriginUnreachable, match="no member of the swarm has the missing pieces"):
        await fetch.outcome()
    assert scene.held() == [0, 1]
    assert scene.origin.reads == []


@runs()
async def test_how_long_a_download_without_an_origin_waits_for_peers_is_a_setting(scene: Scene) -> None:
    scene.peer().takes_part([0, 1]).serves(scene.content)
    scene.service._give_up_after = 3.0
    with pytest.raises(OriginUnreachable):
        await scene.fetch(scene.request(no_origin=True)).outcome()
    assert 3.0 <= trio.current_time() < 6.0


@runs()
async def test_without_an_origin_and_without_anybody_the_error_names_the_content_at_once(scene: Scene) -> None:
    scene.peer()
    scene.by_id[next(iter(scene.by_id))].say(wire.Leave(scene.task.id))
    silent = scene.peer()
    fetch = scene.fetch(scene.request(source=None))
    await trio.sleep(0.1)
    for peer in list(scene.by_id.values()):
        peer.say(wire.Leave(scene.task.id))
    with pytest.raises(OriginUnreachable, match=str(scene.content.digest)):
        await fetch.outcome()
    assert silent.up
    assert trio.current_time() < GIVE_UP_AFTER


@runs()
async def test_when_all_peers_are_gone_the_origin_serves(scene: Scene) -> None:
    peers = [scene.peer().takes_part(reads=False) for _ in range(3)]
    fetch = scene.fetch()
    await trio.sleep(0.5)
    assert scene.origin.reads == []
    for peer in peers:
        peer.hang_up()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.seconds < 0.5 + POLICY.progress_lease


@runs()
async def test_a_url_without_its_origin_is_not_permitted_and_says_what_to_give(scene: Scene) -> None:
    with pytest.raises(NotPermitted, match="--digest"):
        await scene.fetch(FetchRequest(Source(URL), no_origin=True)).outcome()
    with pytest.raises(NotPermitted, match="URL or a digest"):
        await scene.fetch(FetchRequest(None)).outcome()


@runs()
async def test_one_who_may_read_the_origin_does_it_for_one_who_may_not(scene: Scene) -> None:
    peer = scene.peer().takes_part([]).serves(scene.content)
    waiting = scene.fetch(scene.request(no_origin=True))
    await trio.sleep(5)
    assert waiting.error is None
    assert scene.origin.reads == []
    peer.posted.clear()
    helping = scene.fetch()
    await waiting.outcome()
    await helping.outcome()
    assert waiting.bytes == scene.content.bytes
    assert any(join.reads for join in peer.told(wire.Join)), "the neighbours hear of it"


# --- content of unknown length, and others who want it ----------------------------------------------------------------


def streamed(scene: Scene) -> None:
    scene.as_url()
    scene.origin.tells_length = scene.origin.serves_ranges = False


def reads_whole(scene: Scene, *readers: Peer, seconds: float) -> None:
    """They claim the whole, every second, for so long."""

    async def claim() -> None:
        for number in range(int(seconds)):
            for reader in readers:
                reader.claims(reader.claim(-1, lease=2.0, seq=number + 1, length=0, piece_length=MIN_PIECE_BYTES))
            await trio.sleep(1)

    scene.nursery.start_soon(claim)


@runs()
async def test_while_somebody_reads_content_of_unknown_length_the_others_wait_and_take_it_from_there(scene: Scene) -> None:
    streamed(scene)
    reader = scene.peer().serves(scene.content)
    scene.discovery.members = [scene.provider(reader)]
    reads_whole(scene, reader, seconds=60)
    fetch = scene.fetch()
    await trio.sleep(60)
    assert scene.origin.reads == []
    reader.takes_part()
    reader.join()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.from_peers == fetched.length


@runs()
async def test_when_the_reader_of_unknown_length_falls_silent_the_next_reads(scene: Scene) -> None:
    streamed(scene)
    reader = scene.peer()
    scene.discovery.members = [scene.provider(reader)]
    reads_whole(scene, reader, seconds=20)
    fetch = scene.fetch()
    await trio.sleep(19)
    assert scene.origin.reads == []
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.seconds < 20 + 3 * POLICY.progress_lease_small


@runs()
async def test_members_that_claim_the_whole_for_ever_and_bring_nothing_are_not_waited_for_for_ever(scene: Scene) -> None:
    streamed(scene)
    liars = [scene.peer() for _ in range(MAX_READERS + 2)]
    scene.discovery.members = [scene.provider(liar) for liar in liars]
    fetch = scene.fetch()
    for liar in liars:
        reads_whole(scene, liar, seconds=1000)
        await trio.sleep(READER_PATIENCE - 20)
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.seconds < MAX_READERS * READER_PATIENCE


@runs()
async def test_one_old_claim_on_the_whole_played_again_and_again_keeps_nobody_waiting(scene: Scene) -> None:
    streamed(scene)
    reader, replayer = scene.peer(), scene.peer()
    scene.discovery.members = [scene.provider(reader)]
    old = reader.claim(-1, lease=2.0, length=0, piece_length=MIN_PIECE_BYTES)

    async def replay() -> None:
        for _ in range(600):
            replayer.claims(old)
            await trio.sleep(0.5)

    scene.nursery.start_soon(replay)
    fetched = await scene.fetch().outcome()
    assert fetched.seconds < 3 * POLICY.progress_lease_small


@runs()
async def test_claims_on_the_whole_of_something_else_keep_nobody_waiting(scene: Scene) -> None:
    streamed(scene)
    liar = scene.peer()
    scene.discovery.members = [scene.provider(liar)]

    async def claim() -> None:
        for number in range(1, 600):
            other = liar.claim(-1, seq=number, task=bytes(32), length=0, piece_length=MIN_PIECE_BYTES)
            forged = liar.claim(-1, seq=number, length=0, piece_length=MIN_PIECE_BYTES)
            liar.say(wire.Claims(scene.task.id, [other, wire.Signed(forged.body, forged.key, bytes(64)), liar.claim(3)]))
            await trio.sleep(0.5)

    scene.nursery.start_soon(claim)
    fetched = await scene.fetch().outcome()
    assert fetched.seconds < 3 * POLICY.progress_lease_small


@runs()
async def test_a_geometry_that_nobody_derives_costs_its_sender_the_link(scene: Scene) -> None:
    streamed(scene)
    scene.origin.open = trio.Event()
    liar = scene.peer()
    fetch = scene.fetch()
    await trio.sleep(0.05)
    assert liar.told(wire.Ask)
    liar.say(wire.Join(scene.task.id, scene.content.geometry.length, 2 * MIN_PIECE_BYTES, complete=True))
    assert "piece length" in liar.violation
    scene.origin.open.set()
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes


@pytest.mark.parametrize("told", [3, COUNT + 5])
@pytest.mark.parametrize("by_digest", [True, False])
def test_who_lies_about_a_length_that_the_origin_does_not_tell_is_found_out_and_the_content_comes(
    told: int, by_digest: bool
) -> None:
    async def script(scene: Scene) -> None:
        if not by_digest:
            scene.as_url()
        scene.origin.tells_length = scene.origin.serves_ranges = False
        liar = scene.peer()
        liar.answers(wire.Join(scene.task.id, told * MIN_PIECE_BYTES, MIN_PIECE_BYTES, complete=True))
        fetch = scene.fetch()
        await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        assert liar.dropped == "it told a wrong length"
        assert len(scene.origin.reads) == 2, "one to find out, and one that counts"

    play(script)


@runs()
async def test_one_liar_does_not_have_the_word_about_the_length_of_what_only_members_know(scene: Scene) -> None:
    liar = scene.peer()
    honest = [scene.peer().serves(scene.content) for _ in range(2)]
    lie = wire.Join(scene.task.id, 3 * MIN_PIECE_BYTES, MIN_PIECE_BYTES, complete=True)
    fetch = scene.fetch(scene.request(source=None))
    await trio.sleep(0.05)
    for _ in range(10):
        liar.say(lie)
    await trio.sleep(0.05)
    for peer in honest:
        assert peer.told(wire.Ask)
        peer.takes_part().join()
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes


@runs()
async def test_who_asks_while_we_read_the_whole_hears_of_it_at_once(scene: Scene) -> None:
    streamed(scene)
    scene.origin.seconds_a_piece = 10.0
    scene.fetch()
    await trio.sleep(5.5)
    peer = scene.peer()
    peer.say(wire.Ask(scene.task.id))
    assert [type(message) for message in peer.posted] == [wire.Claims]


def rival(scene: Scene, *, first: bool) -> Peer:
    """A member that is before (or after) us in the order of readers of the whole."""
    while True:
        peer = scene.peer()
        if (score(peer.node_id, scene.task.id, -1) > score(scene.membership.node_id, scene.task.id, -1)) is first:
            return peer
        peer.hang_up()


@pytest.mark.parametrize(("first", "after", "gives_way"), [(True, 1.5, True), (False, 1.5, False), (True, 3.5, False)])
def test_of_two_that_begin_to_read_the_whole_at_the_same_moment_the_lower_gives_way(
    first: bool, after: float, gives_way: bool
) -> None:
    async def script(scene: Scene) -> None:
        streamed(scene)
        scene.origin.seconds_a_piece = 5.0
        fetch = scene.fetch()
        await trio.sleep(0.2)
        other = rival(scene, first=first).serves(scene.content)
        await trio.sleep(after)
        reads_whole(scene, other, seconds=30)
        await trio.sleep(20)
        other.takes_part().join()
        fetched = await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        assert len(scene.origin.reads) == 1
        assert (fetched.from_peers > 0) is gives_way

    play(script)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["origin", "peer"])
def test_a_disk_that_fills_in_the_middle_ends_the_fetch_and_with_room_again_it_resumes(source: str) -> None:
    async def script(scene: Scene) -> None:
        if source == "peer":
            scene.peer().takes_part().serves(scene.content)
        request = scene.request(no_origin=source == "peer")
        written = 0
        check = scene.store._check_size

        def full(content: object, piece: int, data: memoryview) -> None:
            nonlocal written
            if written == 3:
                raise NoSpace("the disk is full")
            check(content, piece, data)  # type: ignore[arg-type]
            written += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scene.store, "_check_size", full)
            with pytest.raises(NoSpace):
                await scene.fetch(request).outcome()
        kept = scene.held()
        assert len(kept) == 3
        assert scene.discovery.announced == {}
        fetch = scene.fetch(request)
        fetched = await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        assert fetched.from_local == sum(map(scene.content.geometry.size, kept))

    play(script)


@runs(store=partial(MemoryStore, quota_bytes=3 * MIN_PIECE_BYTES))
async def test_content_that_does_not_fit_is_neither_read_nor_announced(scene: Scene) -> None:
    with pytest.raises(NoSpace):
        await scene.fetch().outcome()
    await trio.sleep(1)
    assert scene.origin.reads == []
    assert scene.discovery.announced == {}


@runs(store=partial(MemoryStore, quota_bytes=10 * MIN_PIECE_BYTES))
async def test_what_is_only_kept_for_others_gives_way_to_what_is_wanted_now(scene: Scene) -> None:
    await scene.fetch().outcome()
    assert [entry.in_use for entry in scene.store.entries()] == [True]
    scene.origin.content = OTHER
    fetch = scene.fetch(scene.request(digest=OTHER.digest))
    await fetch.outcome()
    assert fetch.bytes == OTHER.bytes
    assert scene.store.open(scene.task.id) is None


def rot(scene: Scene, *rotten: int) -> None:
    """Flip a byte of these pieces behind the store's back."""
    (body,) = scene.store._bodies.values()
    for piece in rotten:
        offset = scene.content.geometry.offset(piece)
        os.pwrite(body, bytes([os.pread(body, 1, offset)[0] ^ 1]), offset)
    os.utime(body, ns=(0, 0))


@runs()
async def test_a_rotten_piece_is_not_served_but_withdrawn_and_fetched_again(scene: Scene) -> None:
    neighbour = scene.peer().takes_part([])
    await scene.fetch().outcome()
    reads = len(scene.origin.reads)
    rot(scene, 5)
    asked = wire.Request(1, scene.task.id, 5, 0, scene.content.geometry.size(5))
    assert scene.service.serve(neighbour.node_id, asked, encrypted=False) == wire.NOT_HELD
    await trio.sleep(0.1)
    assert neighbour.told(wire.Lost) == [wire.Lost(scene.task.id, [5])]
    await trio.sleep(30)
    assert len(scene.origin.reads) == reads + 1
    served = scene.service.serve(neighbour.node_id, asked, encrypted=False)
    assert not isinstance(served, int)
    served.body.release()  # type: ignore[union-attr]
    assert wire.Have(scene.task.id, [5]) in neighbour.told(wire.Have)
    again = scene.fetch()
    await again.outcome()
    assert again.bytes == scene.content.bytes


@runs()
async def test_a_rotten_piece_of_what_was_asked_for_without_an_origin_comes_from_a_peer(scene: Scene) -> None:
    neighbour = scene.peer().takes_part().serves(scene.content)
    await scene.fetch(scene.request(no_origin=True)).outcome()
    asked = len(neighbour.asked)
    rot(scene, 2, 6)
    for piece in (2, 6):
        request = wire.Request(1, scene.task.id, piece, 0, scene.content.geometry.size(piece))
        assert scene.service.serve(neighbour.node_id, request, encrypted=False) == wire.NOT_HELD
    await trio.sleep(5)
    assert sorted(neighbour.pieces_asked[asked:]) == [2, 6]
    again = scene.fetch()
    await again.outcome()
    assert again.bytes == scene.content.bytes


# --- serving, and leaving ---------------------------------------------------------------------------------------------


async def stored(scene: Scene) -> None:
    """The content is complete, and nobody uses it."""
    await scene.fetch().outcome()
    scene.service.release(scene.task.id)
    assert not [entry for entry in scene.store.entries() if entry.in_use]


@runs()
async def test_what_is_stored_is_offered_with_a_seal_to_who_asks_and_closed_when_nobody_does(scene: Scene) -> None:
    await stored(scene)
    asker = scene.peer()
    asker.say(wire.Ask(scene.task.id))
    (join,) = asker.told(wire.Join)
    assert join.complete
    assert join.seal is not None
    await trio.sleep(IDLE_SECONDS - 1)
    assert [entry.in_use for entry in scene.store.entries()] == [True]
    await trio.sleep(2)
    assert [entry.in_use for entry in scene.store.entries()] == [False]


@runs()
async def test_a_neighbour_that_never_finishes_does_not_hold_content_in_use_for_ever(scene: Scene) -> None:
    await stored(scene)
    asker = scene.peer()
    geometry = scene.content.geometry
    asker.say(wire.Join(scene.task.id, geometry.length, geometry.piece_length, held=bytes(1), reply=True))
    await trio.sleep(2 * IDLE_SECONDS)
    assert [entry.in_use for entry in scene.store.entries()] == [True]
    await trio.sleep(COMPANY_SECONDS)
    assert [entry.in_use for entry in scene.store.entries()] == [False]


@pytest.mark.parametrize(
    "request_of",
    [
        lambda geometry: (COUNT, 0, geometry.size(0)),
        lambda geometry: (wire.MAX_PIECES - 1, 0, 1),
        lambda geometry: (0, 1, geometry.size(0) - 1),
        lambda geometry: (0, 0, geometry.size(0) + 1),
        lambda geometry: (0, 0, 0),
        lambda geometry: (wire.SEAL_TABLE, 0, 32 * COUNT + 1),
        lambda geometry: (wire.SEAL_TABLE, 32 * COUNT, 32),
    ],
)
def test_a_request_for_bytes_that_do_not_exist_is_refused(request_of: Callable[..., tuple[int, int, int]]) -> None:
    async def script(scene: Scene) -> None:
        await stored(scene)
        request = wire.Request(1, scene.task.id, *request_of(scene.content.geometry))
        assert scene.service.serve(scene.peer().node_id, request, encrypted=True) in (wire.NOT_HELD, wire.REFUSED)

    play(script)


@runs()
async def test_a_part_that_is_kept_from_an_earlier_attempt_is_offered_to_nobody(scene: Scene) -> None:
    fetch = scene.fetch()
    await trio.sleep(0.25)
    fetch.scope.cancel()
    await trio.sleep(1)
    assert scene.held()
    asker = scene.peer()
    asker.say(wire.Ask(scene.task.id))
    assert asker.posted == [wire.Leave(scene.task.id)]


@runs()
async def test_draining_lets_a_download_end_and_takes_no_new_one(scene: Scene) -> None:
    running = scene.fetch()
    await trio.sleep(0.15)
    scene.nursery.start_soon(scene.service.drain, 30.0)
    await trio.sleep(0.01)
    with pytest.raises(Interrupted, match="stopping"):
        await scene.fetch(scene.request(digest=OTHER.digest)).outcome()
    await running.outcome()
    assert running.bytes == scene.content.bytes


@runs()
async def test_draining_cuts_a_download_that_does_not_end_in_time_and_it_can_be_resumed(scene: Scene) -> None:
    scene.origin.seconds_a_piece = 4.0
    running = scene.fetch()
    await trio.sleep(5)
    begun = trio.current_time()
    await scene.service.drain(2.0)
    assert trio.current_time() - begun == pytest.approx(2.0)
    with pytest.raises(Interrupted, match="ask again to resume"):
        await running.outcome()
    assert scene.held(), "what was verified is kept"
    await trio.sleep(0.1)
    assert scene.discovery.announced == {}


@runs()
async def test_a_draining_node_opens_nothing_for_others(scene: Scene) -> None:
    await stored(scene)
    await scene.service.drain(1.0)
    asker = scene.peer()
    asker.say(wire.Ask(scene.task.id))
    assert asker.posted == [wire.Leave(scene.task.id)]


@runs()
async def test_content_fetched_by_url_is_found_by_its_digest(scene: Scene) -> None:
    await scene.fetch(FetchRequest(Source(URL))).outcome()
    reads = len(scene.origin.reads)
    scene.task = blob_task(scene.content.digest)
    fetched = await scene.fetch(scene.request(no_origin=True)).outcome()
    assert fetched.from_local == fetched.length
    assert len(scene.origin.reads) == reads
