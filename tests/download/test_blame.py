"""Wrong bytes and who is to blame for them (SECURITY: T1, T2): found, dropped, remembered, and the right content in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from blake3 import blake3

from swarm import proofs, wire
from swarm.download.blame import MAX_DISPUTES
from swarm.download.requests import TABLE_PATIENCE
from swarm.edges import FileSlice, Started
from swarm.errors import DigestMismatch, IntegrityError, OriginUnreachable
from swarm.task import MIN_PIECE_BYTES
from tests.download.scene import Asked, Content, Peer, Scene, play, runs

COUNT = 8
OTHER = Content(COUNT, seed=2)

# --- bytes that do not match what was sent with them ------------------------------------------------------------------


@runs()
async def test_bytes_that_do_not_match_their_proof_are_not_written_and_their_sender_is_banned(scene: Scene) -> None:
    liar, honest = scene.peer().takes_part(), scene.peer().takes_part()

    def flips(asked: Asked) -> None:
        data = scene.content.piece(asked.piece)
        liar.deliver(asked, data[:-1] + bytes([data[-1] ^ 1]), liar.prove(asked.piece, data))

    liar.sends = flips
    fetch = scene.fetch(scene.request(no_origin=True))
    await trio.sleep(1)
    assert liar.dropped == "bytes that do not match the proof sent with them"
    assert scene.held() == []
    assert scene.service.totals.pieces_bad == 1, "after one bad piece nothing more is asked of it"
    honest.serves(scene.content)
    for asked in list(honest.waiting.values()):
        honest.sends(asked)
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes


@runs()
async def test_a_banned_sender_is_not_linked_again_until_its_time_is_over(scene: Scene) -> None:
    liar = scene.peer().takes_part()
    liar.sends = lambda asked: liar.deliver(asked, bytes(MIN_PIECE_BYTES), liar.prove(asked.piece, b""))
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(1)
    assert liar.dropped
    liar.dropped = ""
    scene.link_with(liar)
    await trio.sleep(0.1)
    assert liar.dropped == "banned"
    assert not liar.up
    await trio.sleep(60)
    liar.dropped = ""
    scene.link_with(liar)
    assert not liar.dropped


@runs()
async def test_a_banned_sender_whose_link_is_slow_to_close_does_not_join_again(scene: Scene) -> None:
    liar = scene.peer().takes_part()
    liar.sends = lambda asked: liar.deliver(asked, bytes(MIN_PIECE_BYTES), liar.prove(asked.piece, b""))
    liar.drop = lambda reason: None  # type: ignore[method-assign]
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(1)
    asked = len(liar.asked)
    liar.join()
    assert liar.violation == "banned"
    await trio.sleep(1)
    assert len(liar.asked) == asked


WRONG_HEADERS: dict[str, Callable[[Peer, int, bytes], tuple[bytes, wire.Signed | None]]] = {
    "no proof": lambda _peer, _piece, data: (data, None),
    "too short": lambda peer, piece, data: (data[:-1], peer.prove(piece, data[:-1])),
    "too long": lambda peer, piece, data: (data + b"x", peer.prove(piece, data + b"x")),
    "the proof of another piece": lambda peer, piece, data: (data, peer.prove(piece + 1, data)),
    "the proof of another task": lambda peer, piece, data: (data, peer.prove(piece, data, task=bytes(32))),
    "the proof of other content of that task": lambda peer, piece, data: (data, peer.prove(piece, data, length=1)),
    "the proof of larger pieces": lambda peer, piece, data: (data, peer.prove(piece, data, piece_length=2 * MIN_PIECE_BYTES)),
    "a forged signature": lambda peer, piece, data: (data, _forged(peer, piece, data)),
    "a claim for a proof": lambda peer, piece, data: (data, peer.claim(piece)),
    "a proof that is none": lambda peer, _piece, data: (data, peer.membership.sign("proof", wire.Ask(bytes(32)))),
}


def _forged(peer: Peer, piece: int, data: bytes) -> wire.Signed:
    """The body says what was sent, under the signature of another one."""
    signed = peer.prove(piece, b"what it signed")
    return wire.Signed(peer.prove(piece, data).body, signed.key, signed.signature)


@pytest.mark.parametrize("wrong", WRONG_HEADERS)
def test_a_piece_that_nobody_answers_for_is_refused_at_its_header_and_its_sender_banned(wrong: str) -> None:
    async def script(scene: Scene) -> None:
        liar = scene.peer().takes_part()
        taken: list[bool] = []
        liar.sends = lambda asked: taken.append(
            liar.deliver(asked, *WRONG_HEADERS[wrong](liar, asked.piece, scene.content.piece(asked.piece)))
        )
        scene.fetch(scene.request(no_origin=True))
        await trio.sleep(1)
        assert taken == [False]
        assert liar.dropped
        assert scene.held() == []
        assert scene.service.totals.bans == 1

    play(script)


@runs()
async def test_bytes_nobody_asked_for_are_refused(scene: Scene) -> None:
    pusher = scene.peer().takes_part()
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(1)
    data = scene.content.piece(5)
    number = 1 + max(pusher.waiting)
    assert not scene.service.piece_started(pusher, Started(number, len(data), pusher.prove(5, data), pusher.public_key))
    scene.service.piece_received(pusher, number, blake3(data).digest(), memoryview(data))
    assert scene.held() == []


@runs(count=1)
async def test_a_piece_that_comes_too_late_is_wasted_and_not_written_again(scene: Scene) -> None:
    slow, fast = scene.peer().takes_part(), scene.peer().takes_part()
    slow.cancel = lambda request_id: None  # type: ignore[method-assign]  # its header was on its way already
    fetch = scene.fetch(scene.request(no_origin=True))
    await trio.sleep(1)
    (late,), (first,) = slow.asked, fast.asked
    assert fast.answer(first, scene.content)
    assert slow.answer(late, scene.content)
    await fetch.outcome()
    totals = scene.service.totals
    assert (totals.pieces_from_peers, totals.pieces_wasted, totals.bans) == (1, 1, 0)


# --- who signed it ----------------------------------------------------------------------------------------------------


@runs()
async def test_who_passes_on_what_a_stranger_signed_is_passed_over_without_blame(scene: Scene) -> None:
    stranger = scene.peer(linked=False)
    carrier = scene.peer().takes_part()
    carrier.sends = lambda asked: carrier.deliver(
        asked, scene.content.piece(asked.piece), stranger.prove(asked.piece, scene.content.piece(asked.piece))
    )
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(5)
    assert scene.held() == []
    assert carrier.up
    assert len(carrier.asked) == len(set(carrier.pieces_asked)) > 1, "several were tried, none of them twice"
    assert scene.service.totals.bans == 0


@runs()
async def test_what_a_revoked_member_signed_is_not_written_and_its_carrier_not_blamed(scene: Scene) -> None:
    revoked = scene.peer(linked=False)
    scene.membership.revoked.add(revoked.public_key)
    carrier = scene.peer().takes_part().serves(scene.content, signer=revoked)
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(5)
    assert scene.held() == []
    assert carrier.asked
    assert carrier.up


@runs()
async def test_a_piece_whose_signer_was_revoked_is_served_under_our_own_name_once_all_was_verified(scene: Scene) -> None:
    signer = scene.peer().takes_part().serves(scene.content)
    fetch = scene.fetch(scene.request(no_origin=True))
    await fetch.outcome()
    assert voucher(scene, signer, 0) == (signer.public_key, signer.public_key)
    scene.membership.revoked.add(signer.public_key)
    assert voucher(scene, signer, 0) == (scene.membership.public_key, scene.membership.certificate)


@runs()
async def test_a_piece_whose_signer_was_revoked_is_not_served_while_nothing_else_vouches_for_it(scene: Scene) -> None:
    signer = scene.peer().takes_part([0]).serves(scene.content)
    scene.fetch(scene.request(no_origin=True))
    await trio.sleep(2)
    assert scene.held() == [0]
    assert voucher(scene, signer, 0) == (signer.public_key, signer.public_key)
    scene.membership.revoked.add(signer.public_key)
    assert voucher(scene, signer, 0) is None


def voucher(scene: Scene, asker: Peer, piece: int) -> tuple[bytes, bytes] | None:
    """Key and certificate of whoever vouches for a piece that we serve; `None` if it is not held for them."""
    request = wire.Request(1, scene.task.id, piece, 0, scene.content.geometry.size(piece))
    served = scene.service.serve(asker.node_id, request, encrypted=False)
    if isinstance(served, int):
        assert served == wire.NOT_HELD
        return None
    assert isinstance(served.body, FileSlice)
    served.body.release()
    assert served.proof is not None
    asker.membership.learn(served.certificate)
    proofs.check_proof(asker.membership, served.proof, scene.task.id, scene.content.geometry, piece)
    return served.proof.key, served.certificate


# --- a known digest does not match ------------------------------------------------------------------------------------


@runs()
async def test_a_member_that_signs_wrong_bytes_is_found_by_a_sample_and_all_it_vouched_for_fetched_anew(scene: Scene) -> None:
    scene.origin.open = trio.Event()
    liar = scene.peer().takes_part([0, 2, 4, 6]).serves(OTHER)
    honest = scene.peer().takes_part([1, 3, 5, 7]).serves(scene.content)
    fetch = scene.fetch()
    await trio.sleep(1)
    assert len(scene.held()) == COUNT, "all of it is here, and half of it wrong"
    scene.origin.open.set()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert liar.dropped == "it vouched for wrong bytes"
    assert honest.up
    assert fetched.why_origin.pop("dispute") == 2, "one piece of each signer"
    assert sum(fetched.why_origin.values()) == 4, "and what the liar vouched for"
    liar.dropped = ""
    scene.link_with(liar)
    await trio.sleep(0.1)
    assert liar.dropped == "banned"


@runs()
async def test_who_passed_a_liars_pieces_on_is_not_banned_but_the_liar_is(scene: Scene) -> None:
    scene.origin.open = trio.Event()
    liar = scene.peer(linked=False)
    carrier = scene.peer().takes_part().serves(OTHER, signer=liar)
    fetch = scene.fetch()
    await trio.sleep(1)
    assert len(scene.held()) == COUNT
    scene.origin.open.set()
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert carrier.up
    scene.link_with(liar)
    await trio.sleep(0.1)
    assert liar.dropped == "banned"


@pytest.mark.parametrize("wrong", range(COUNT))
def test_a_member_that_lies_about_a_single_piece_cannot_keep_the_content_from_coming_right(wrong: int) -> None:
    async def script(scene: Scene) -> None:
        scene.origin.open = trio.Event()
        liar = scene.peer().takes_part().serves(scene.content.mixed(OTHER, [wrong]))
        fetch = scene.fetch()
        await trio.sleep(1)
        assert len(scene.held()) == COUNT
        scene.origin.open.set()
        fetched = await fetch.outcome()
        assert fetch.bytes == scene.content.bytes
        assert len(liar.asked) == COUNT, "from there on nobody but the origin is asked"
        assert sum(fetched.why_origin.values()) == COUNT + 1, "a sample, and everything"

    play(script)


@runs()
async def test_an_origin_with_other_content_than_was_asked_for_is_named_and_nothing_of_it_is_kept(scene: Scene) -> None:
    scene.origin.content = OTHER
    fetch = scene.fetch()
    with pytest.raises(DigestMismatch, match="the origin has other content"):
        await fetch.outcome()
    assert scene.held() == []
    scene.origin.content = scene.content
    fetch = scene.fetch()
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes


@runs()
async def test_an_origin_with_other_content_does_not_get_honest_members_banned(scene: Scene) -> None:
    scene.origin.content = OTHER
    scene.origin.open = trio.Event()
    scene.peer().takes_part().serves(OTHER)
    fetch = scene.fetch()
    await trio.sleep(1)
    scene.origin.open.set()
    with pytest.raises(DigestMismatch, match="the origin has other content"):
        await fetch.outcome()
    assert scene.service.totals.bans == 0
    assert scene.held() == []


@runs()
async def test_members_with_other_content_and_no_origin_to_ask_leave_nothing_behind(scene: Scene) -> None:
    scene.peer().takes_part().serves(OTHER)
    fetch = scene.fetch(scene.request(no_origin=True))
    with pytest.raises(DigestMismatch, match="members of the swarm sent"):
        await fetch.outcome()
    assert scene.held() == []


@runs()
async def test_liars_are_found_in_the_next_fetch_where_the_origin_was_down_in_this_one(scene: Scene) -> None:
    scene.origin.open = trio.Event()
    liar = scene.peer().takes_part([0, 2, 4, 6]).serves(OTHER)
    honest = scene.peer().takes_part([1, 3, 5, 7]).serves(scene.content)
    fetch = scene.fetch()
    await trio.sleep(1)
    assert len(scene.held()) == COUNT
    scene.origin.error = OriginUnreachable("down")
    scene.origin.open.set()
    with pytest.raises(OriginUnreachable, match="down"):
        await fetch.outcome()
    scene.origin.error = None
    liar.hang_up()
    fetched = await scene.fetch().outcome()
    assert fetched.from_local > 0
    assert honest.up
    scene.link_with(liar)
    await trio.sleep(0.1)
    assert liar.dropped == "banned"


# --- no digest is known: members' statements differ -------------------------------------------------------------------


def only_its_table(peer: Peer, content: Content) -> Peer:
    """It sends its table of digests, and is too busy for pieces."""

    def sends(asked: Asked) -> None:
        if asked.piece == wire.SEAL_TABLE:
            peer.answer(asked, content)
        else:
            peer.refuse(asked.request_id, wire.BUSY)

    peer.sends = sends
    return peer


@runs()
async def test_a_seal_over_other_bytes_is_looked_into_and_the_origin_finds_its_sealer_lying(scene: Scene) -> None:
    scene.as_url()
    liar, lie = scene.peer(), scene.content.mixed(OTHER, [5])
    only_its_table(liar.takes_part([], seal=liar.seal(lie)), lie)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.why_origin["dispute"] == 1, "the first piece in which they differ"
    assert scene.origin.pieces_read[-1] == 5
    assert liar.dropped == "it vouched for wrong bytes"


@runs()
async def test_wrong_pieces_are_found_by_an_honest_seal_and_their_signer_is_banned(scene: Scene) -> None:
    scene.as_url()
    scene.origin.open = trio.Event()
    liar = scene.peer().takes_part().serves(scene.content.mixed(OTHER, [2, 5]))
    honest = scene.peer()
    only_its_table(honest.takes_part([], seal=honest.seal(scene.content)), scene.content)
    fetch = scene.fetch()
    await trio.sleep(3)
    assert len(scene.held()) == COUNT
    scene.origin.open.set()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.digest == scene.content.digest
    assert liar.dropped == "it vouched for wrong bytes"
    assert honest.up


@runs()
async def test_a_seal_whose_table_does_not_add_up_to_its_digest_gets_its_sealer_banned(scene: Scene) -> None:
    scene.as_url()
    liar = scene.peer()
    only_its_table(liar.takes_part([], seal=liar.seal(scene.content, digest=OTHER.digest)), scene.content)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetched.digest == scene.content.digest
    assert liar.dropped == "it vouched for wrong bytes"
    assert "dispute" not in fetched.why_origin


@pytest.mark.parametrize("how", ["other bytes", "too short"])
def test_a_table_that_is_not_the_sealed_one_gets_its_sender_banned(how: str) -> None:
    async def script(scene: Scene) -> None:
        scene.as_url()
        liar = scene.peer()
        liar.takes_part([], seal=liar.seal(OTHER))
        sent = scene.content.table() if how == "other bytes" else OTHER.table()[:-32]
        liar.sends = lambda asked: asked.piece == wire.SEAL_TABLE and liar.deliver(asked, sent, None)
        fetched = await scene.fetch().outcome()
        assert fetched.digest == scene.content.digest
        await trio.sleep(0.1)
        assert not liar.up

    play(script)


@runs()
async def test_a_sealer_that_never_sends_its_table_holds_the_download_up_for_a_while_only(scene: Scene) -> None:
    scene.as_url()
    liar = scene.peer()
    liar.takes_part([], seal=liar.seal(OTHER))
    liar.sends = lambda asked: None if asked.piece == wire.SEAL_TABLE else liar.refuse(asked.request_id, wire.NOT_HELD)
    fetched = await scene.fetch().outcome()
    assert fetched.digest == scene.content.digest
    assert TABLE_PATIENCE <= fetched.seconds < TABLE_PATIENCE + 5


@runs()
async def test_an_origin_that_contradicts_itself_ends_in_an_error_and_not_in_a_circle(scene: Scene) -> None:
    scene.as_url()
    honest = scene.peer()
    only_its_table(honest.takes_part([], seal=honest.seal(scene.content)), scene.content)
    good, bad, read = scene.content, scene.content.mixed(OTHER, [3]), scene.origin.read
    disputes = 0

    def flickers(*arguments: Any, **named: Any) -> Any:
        nonlocal disputes
        looked_into = len(scene.held()) == COUNT
        scene.origin.content = good if looked_into else bad
        disputes += looked_into
        return read(*arguments, **named)

    scene.origin.read = flickers  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match="contradict"):
        await scene.fetch().outcome()
    assert disputes == MAX_DISPUTES + 1
    assert honest.up
