"""What members say: claims, seals, bitmaps, gains and losses, introductions; and what a liar gets out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from simulations.membership import SimulatedMembership
from swarm import proofs, wire
from swarm.edges import State
from swarm.task import MIN_PIECE_BYTES
from tests.download.scene import POLICY, Content, Peer, Scene, play, runs

COUNT = 8
OTHER = Content(COUNT, seed=2)


async def fetching(scene: Scene, *peers: Peer) -> None:
    """A fetch that waits for its origin while these peers take part; with peers that may not read, all is ours to read."""
    scene.origin.open = trio.Event()
    scene.fetch()
    await trio.sleep(1)
    for peer in peers:
        assert peer.told(wire.Join), "it was greeted"


def unread(scene: Scene) -> set[int]:
    return set(range(COUNT)) - set(scene.origin.pieces_read)


# --- claims -----------------------------------------------------------------------------------------------------------


async def keeps_unread(scene: Scene, claimed: Callable[[int], None]) -> bool:
    """Whether a claim on a piece that is not read yet keeps us from reading it while the claim lasts."""
    piece = max(unread(scene))
    claimed(piece)
    scene.origin.open.set()
    await trio.sleep(2)
    return piece not in scene.held()


@runs()
async def test_a_claim_keeps_us_from_reading_what_its_owner_reads(scene: Scene) -> None:
    peer = scene.peer().takes_part([], reads=False)
    await fetching(scene, peer)
    assert await keeps_unread(scene, lambda piece: void(peer.claims(peer.claim(piece))))


def void(_: object) -> None:
    return None


@runs()
async def test_a_claim_with_a_forged_signature_costs_its_sender_the_link_and_holds_nothing_up(scene: Scene) -> None:
    forger, victim = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, forger, victim)

    def forged(piece: int) -> None:
        signed = forger.claim(piece)
        forger.claims(wire.Signed(signed.body, victim.public_key, signed.signature))

    assert not await keeps_unread(scene, forged)
    assert forger.violation == "a claim with a bad signature"
    assert victim.up


@runs()
async def test_a_claim_with_a_bad_signature_is_passed_on_to_nobody_though_it_comes_from_its_owner(scene: Scene) -> None:
    owner, other = (scene.peer().takes_part([]) for _ in range(2))
    await fetching(scene, owner, other)
    claim = owner.claim(max(unread(scene)))
    bad = wire.Signed(claim.body, claim.key, bytes(64))
    owner.say(wire.Claims(scene.task.id, [bad], owner.node_id[:4]))
    await trio.sleep(0.5)
    assert owner.violation == "a claim with a bad signature"
    assert not [message for message in other.told(wire.Claims) if bad in message.claims]


@runs()
async def test_a_claim_that_carries_anothers_signature_does_not_keep_the_others_out(scene: Scene) -> None:
    thief, owner, carrier = (scene.peer().takes_part([], reads=False) for _ in range(3))
    await fetching(scene, thief, owner, carrier)

    def stolen(piece: int) -> None:
        claim = owner.claim(piece)
        thief.claims(wire.Signed(thief.claim(min(unread(scene))).body, thief.public_key, claim.signature))
        carrier.claims(claim)

    assert await keeps_unread(scene, stolen)


OTHER_CLAIMS: dict[str, dict[str, Any]] = {
    "another task": {"task": bytes(32)},
    "content of another length": {"length": 5 * MIN_PIECE_BYTES},
    "larger pieces": {"piece_length": 2 * MIN_PIECE_BYTES},
}


@pytest.mark.parametrize("other", OTHER_CLAIMS)
def test_a_claim_for_other_content_holds_nothing_up(other: str) -> None:
    async def script(scene: Scene) -> None:
        peer = scene.peer().takes_part([], reads=False)
        await fetching(scene, peer)
        assert not await keeps_unread(scene, lambda piece: void(peer.claims(peer.claim(piece, **OTHER_CLAIMS[other]))))
        assert peer.up, "whoever passed it on need not know our geometry"

    play(script)


@runs()
async def test_a_claim_signed_by_no_member_holds_nothing_up_and_its_carrier_is_not_blamed(scene: Scene) -> None:
    carrier, stranger = scene.peer().takes_part([], reads=False), scene.peer(linked=False)
    await fetching(scene, carrier)
    assert not await keeps_unread(scene, lambda piece: void(carrier.claims(stranger.claim(piece))))
    assert carrier.up


@runs()
async def test_a_claim_signed_in_another_network_holds_nothing_up(scene: Scene) -> None:
    peer, carrier = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, peer, carrier)
    elsewhere = SimulatedMembership(peer.membership._identity, "another network")
    peer.membership, here = elsewhere, peer.membership

    def foreign(piece: int) -> None:
        signed = peer.claim(piece)
        peer.membership = here
        carrier.claims(signed)

    assert not await keeps_unread(scene, foreign)
    assert carrier.violation


@runs()
async def test_a_claim_by_a_revoked_member_holds_nothing_up(scene: Scene) -> None:
    carrier, revoked = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, carrier, revoked)
    scene.membership.revoked.add(revoked.public_key)
    assert not await keeps_unread(scene, lambda piece: void(carrier.claims(revoked.claim(piece))))


@runs()
async def test_a_claim_by_one_who_does_not_take_part_holds_nothing_up(scene: Scene) -> None:
    outsider, member = scene.peer(), scene.peer().takes_part([], reads=False)
    await fetching(scene, outsider, member)
    assert not await keeps_unread(scene, lambda piece: void(outsider.claims(outsider.claim(piece))))
    assert outsider.up


@runs()
async def test_an_old_claim_played_again_after_its_owner_gave_it_up_holds_nothing_up(scene: Scene) -> None:
    owner, replayer = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, owner, replayer)

    def replayed(piece: int) -> None:
        claim = owner.claim(piece)
        owner.claims(claim)
        owner.say(wire.Unclaim(scene.task.id, [piece]))
        replayer.claims(claim)
        owner.claims(claim)

    assert not await keeps_unread(scene, replayed)


@runs()
async def test_old_claims_sent_in_another_order_do_not_count_after_newer_ones(scene: Scene) -> None:
    owner, replayer = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, owner, replayer)

    def held_back(piece: int) -> None:
        first, second = owner.claim(piece, seq=1), owner.claim(piece, seq=2)
        owner.claims(second)
        owner.say(wire.Unclaim(scene.task.id, [piece]))
        replayer.claims(first)

    assert not await keeps_unread(scene, held_back)


@runs()
async def test_nobody_can_take_back_anothers_claim(scene: Scene) -> None:
    owner, other = scene.peer().takes_part([], reads=False), scene.peer().takes_part([], reads=False)
    await fetching(scene, owner, other)

    def taken_back(piece: int) -> None:
        owner.claims(owner.claim(piece))
        other.say(wire.Unclaim(scene.task.id, [piece]))

    assert await keeps_unread(scene, taken_back)


@runs()
async def test_members_that_claim_everything_and_read_nothing_hold_a_fetch_up_for_seconds_only(scene: Scene) -> None:
    """Eight liars renew, replace and repeat whatever they like."""
    liars = [scene.peer().takes_part([]) for _ in range(8)]
    await fetching(scene, *liars)
    scene.origin.open.set()
    begun = trio.current_time()
    seq = 0
    while len(scene.held()) < COUNT:
        assert trio.current_time() - begun < 60
        for liar in liars:
            seq += 1
            for piece in range(COUNT):
                liar.claims(liar.claim(piece, lease=120.0, seq=seq))
        await trio.sleep(0.5)


@runs()
async def test_a_claim_passed_on_reaches_those_its_owner_did_not_and_nobody_twice(scene: Scene) -> None:
    owner, reached, other = (scene.peer().takes_part([]) for _ in range(3))
    await fetching(scene, owner, reached, other)
    claim = owner.claim(max(unread(scene)))
    owner.say(wire.Claims(scene.task.id, [claim], reached.node_id[:4]))
    owner.say(wire.Claims(scene.task.id, [claim], reached.node_id[:4]))
    await trio.sleep(0.5)
    passed_on = [message for message in other.told(wire.Claims) if claim in message.claims]
    assert len(passed_on) == 1
    assert not [message for message in (*owner.told(wire.Claims), *reached.told(wire.Claims)) if claim in message.claims]


# --- seals ------------------------------------------------------------------------------------------------------------

WRONG_SEALS: dict[str, Callable[[Scene, Peer, Peer], wire.Signed]] = {
    "somebody else's": lambda scene, peer, other: other.seal(scene.content),
    "over other content than the task names": lambda scene, peer, other: peer.seal(scene.content, digest=OTHER.digest),
    "over content of another length": lambda scene, peer, other: peer.seal(Content(COUNT - 1), digest=scene.content.digest),
    "over another task": lambda scene, peer, other: proofs.seal(
        peer.membership, bytes(32), scene.content.geometry, scene.content.digest, scene.content.table(), 0
    ),
    "over no digest at all": lambda scene, peer, other: peer.membership.sign(
        "seal",
        wire.SealBody(
            scene.task.id, scene.content.geometry.length, scene.content.geometry.piece_length, "md5:abc", bytes(32), 0
        ),
    ),
    "a stranger's": lambda scene, peer, other: scene.peer(linked=False).seal(scene.content),
    "with a forged signature": lambda scene, peer, other: wire.Signed(
        peer.seal(scene.content).body, peer.public_key, peer.seal(OTHER).signature
    ),
    "a proof": lambda scene, peer, other: peer.prove(0, b""),
}


@pytest.mark.parametrize("wrong", WRONG_SEALS)
@pytest.mark.parametrize("how", ["with its join", "later"])
def test_a_wrong_seal_costs_its_sender_the_link_and_is_not_believed(wrong: str, how: str) -> None:
    async def script(scene: Scene) -> None:
        other, peer = scene.peer().takes_part([]), scene.peer()
        seal = WRONG_SEALS[wrong](scene, peer, other)
        if how == "with its join":
            peer.takes_part([], seal=seal)
        else:
            peer.takes_part([])
        await fetching(scene, other, peer)
        if how == "later":
            assert peer.up
            peer.say(wire.SealOffer(scene.task.id, seal))
        assert peer.violation
        assert not peer.up
        assert not peer.asked, "it is not taken for complete"
        assert other.up

    play(script)


@runs()
async def test_a_right_seal_makes_its_sender_a_holder_of_everything(scene: Scene) -> None:
    peer = scene.peer().takes_part([])
    await fetching(scene, peer)
    assert not peer.asked
    peer.say(wire.SealOffer(scene.task.id, peer.seal(scene.content)))
    await trio.sleep(1)
    assert peer.up
    assert peer.asked


# --- what members say they hold (SECURITY: T3) ------------------------------------------------------------------------


@pytest.mark.parametrize("bitmap", [b"", b"\xff\xff\xff", b"\xff" * 5000, b"\xff\xc0"])
def test_a_bitmap_too_short_too_long_or_with_spare_bits_costs_its_sender_the_link(bitmap: bytes) -> None:
    async def script(scene: Scene) -> None:
        peer = scene.peer()
        await fetching(scene, peer)
        geometry = scene.content.geometry
        peer.say(wire.Join(scene.task.id, geometry.length, geometry.piece_length, held=bitmap))
        assert peer.violation
        assert not peer.asked

    play(script, count=9)


@runs()
async def test_who_says_it_has_everything_and_refuses_is_left_alone_and_the_origin_read(scene: Scene) -> None:
    boaster = scene.peer().takes_part(reads=False).refuses(wire.REFUSED)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.seconds < 2
    assert len(boaster.asked) == 1, "not again and again"


@runs()
async def test_who_says_it_has_everything_and_has_nothing_costs_one_question_a_piece(scene: Scene) -> None:
    boaster = scene.peer().takes_part(reads=False).refuses(wire.NOT_HELD)
    fetch = scene.fetch()
    await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert len(boaster.pieces_asked) == len(set(boaster.pieces_asked))


@runs()
async def test_a_neighbour_that_promises_everything_and_never_sends_does_not_keep_the_content_from_us(scene: Scene) -> None:
    silent = scene.peer().takes_part(reads=False)
    honest = scene.peer().takes_part([0, 1, 2, 3], reads=False).serves(scene.content)
    fetch = scene.fetch()
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert silent.asked
    assert set(honest.pieces_asked) >= {0, 1, 2, 3}, "what waits at the silent one is asked of others too"
    assert fetched.from_peers == sum(map(scene.content.geometry.size, range(4)))
    assert fetched.seconds < POLICY.stuck_holder + 3


@runs()
async def test_a_neighbour_that_withdraws_everything_gives_the_pieces_to_others_at_once(scene: Scene) -> None:
    fickle = scene.peer().takes_part(reads=False)
    fetch = scene.fetch()
    await trio.sleep(1)
    assert fickle.waiting
    assert scene.origin.reads == []
    fickle.say(wire.Lost(scene.task.id, list(range(COUNT))))
    fetched = await fetch.outcome()
    assert fetch.bytes == scene.content.bytes
    assert fetched.seconds < 3
    assert fickle.up


@runs()
async def test_a_peer_that_has_and_has_not_a_thousand_times_a_second_costs_itself_the_link(scene: Scene) -> None:
    fickle = scene.peer().takes_part([])
    await fetching(scene, fickle)
    everything = list(range(COUNT))
    for _ in range(1000):
        fickle.say(wire.Have(scene.task.id, everything), wire.Lost(scene.task.id, everything))
    assert "again and again" in fickle.violation


@runs()
async def test_joining_with_everything_and_with_nothing_in_turn_costs_the_link_too(scene: Scene) -> None:
    fickle = scene.peer()
    await fetching(scene, fickle)
    for _ in range(1000):
        fickle.join(range(COUNT)).join([])
    assert "again and again" in fickle.violation


@runs()
async def test_joining_and_leaving_in_turn_costs_the_link_too(scene: Scene) -> None:
    fickle = scene.peer()
    await fetching(scene, fickle)
    for _ in range(1000):
        fickle.join(range(COUNT), reply=True).say(wire.Leave(scene.task.id))
    assert "again and again" in fickle.violation
    assert len(fickle.posted) < 200, "what it gets out of us is bounded"


@runs()
async def test_who_joins_anew_with_less_is_no_longer_asked_for_the_rest(scene: Scene) -> None:
    peer = scene.peer().takes_part()
    await fetching(scene, peer)
    (asked,) = peer.waiting.values()
    rest = [piece for piece in range(COUNT) if piece != asked.piece]
    peer.join(rest)
    await trio.sleep(0.1)
    assert asked.request_id not in peer.waiting
    assert peer.asked[-1].piece in rest


@runs()
async def test_pieces_that_do_not_exist_are_neither_asked_for_nor_lost_nor_read(scene: Scene) -> None:
    peer = scene.peer().takes_part([])
    await fetching(scene, peer)
    beyond = [COUNT, COUNT + 1, wire.MAX_PIECES - 1]
    peer.say(wire.Have(scene.task.id, beyond), wire.Lost(scene.task.id, beyond), wire.Unclaim(scene.task.id, beyond))
    peer.claims(peer.claim(COUNT), peer.claim(wire.MAX_PIECES - 1))
    await trio.sleep(1)
    assert peer.up
    assert not peer.asked
    scene.origin.open.set()
    await trio.sleep(3)
    assert len(scene.held()) == COUNT


@runs()
async def test_a_member_of_the_same_task_in_other_pieces_is_told_to_leave_and_never_asked(scene: Scene) -> None:
    peer = scene.peer()
    await fetching(scene, peer)
    peer.say(wire.Join(scene.task.id, 3 * MIN_PIECE_BYTES, MIN_PIECE_BYTES, complete=True))
    await trio.sleep(1)
    assert peer.told(wire.Leave)
    assert not peer.asked
    peer.say(wire.Have(scene.task.id, [0, 1]))
    await trio.sleep(1)
    assert not peer.asked


@runs()
async def test_who_never_joined_is_asked_for_nothing_whatever_it_says(scene: Scene) -> None:
    peer = scene.peer()
    await fetching(scene, peer)
    peer.say(wire.Have(scene.task.id, list(range(COUNT))), wire.SealOffer(scene.task.id, peer.seal(scene.content)))
    await trio.sleep(1)
    assert not peer.asked
    assert peer.up


@runs()
async def test_who_left_is_asked_for_nothing_more(scene: Scene) -> None:
    peer = scene.peer().takes_part()
    await fetching(scene, peer)
    asked = len(peer.asked)
    assert asked
    peer.say(wire.Leave(scene.task.id), wire.Have(scene.task.id, list(range(COUNT))))
    await trio.sleep(2)
    assert len(peer.asked) == asked


# --- introductions ----------------------------------------------------------------------------------------------------


@runs()
async def test_a_forged_record_of_a_member_makes_us_dial_nobody(scene: Scene) -> None:
    peer, victim = scene.peer().takes_part([]), scene.peer(linked=False)
    await fetching(scene, peer)
    peer.say(wire.Peers(scene.task.id, [b"forged:" + victim.node_id, b"", bytes(400)]))
    await trio.sleep(2)
    assert scene.dialled == []
    assert peer.up


@runs()
async def test_a_member_that_a_neighbour_knows_is_dialled(scene: Scene) -> None:
    peer, other = scene.peer().takes_part([]), scene.peer(linked=False).takes_part([])
    await fetching(scene, peer)
    provider = scene.provider(other)
    scene.discovery.valid[provider.record] = provider
    peer.say(wire.Peers(scene.task.id, [provider.record]))
    await trio.sleep(1)
    assert scene.dialled == [other.node_id]
    assert other.told(wire.Join)


@runs()
async def test_introductions_without_end_to_members_that_are_not_there_are_followed_a_few_times_each(scene: Scene) -> None:
    peer = scene.peer().takes_part([])
    await fetching(scene, peer)
    providers = [scene.provider(scene.peer(linked=False)) for _ in range(100)]
    scene.reachable.clear()
    scene.discovery.valid = {provider.record: provider for provider in providers}
    records = [provider.record for provider in providers]
    for _ in range(50):
        for start in range(0, len(records), 25):
            peer.say(wire.Peers(scene.task.id, records[start : start + 25]))
        await trio.sleep(1)
    assert scene.dialled
    assert len(scene.dialled) <= 3 * len(providers)


@runs()
async def test_our_own_record_does_not_make_us_dial_ourselves(scene: Scene) -> None:
    peer = scene.peer().takes_part([])
    await fetching(scene, peer)
    own = scene.provider(peer)
    ourselves = type(own)(scene.membership.node_id, scene.membership.public_key, own.control, State.WANTS, b"own")
    scene.discovery.valid[b"own"] = ourselves
    peer.say(wire.Peers(scene.task.id, [b"own"]))
    await trio.sleep(1)
    assert scene.dialled == []
