"""Every number of the exchange policy, with its source.

"simulated" refers to `docs/design/exchange.md`; the benchmarks confirm or correct them on real hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.task import Geometry

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Policy:
    """Numbers of the exchange.  Times are seconds."""

    candidates: int = 8
    """Members nearest to the task key that read the origin; 4-16 are alike, 1 costs a third of the time (simulated)."""

    mesh: int = 24
    """The nearest members connect to one another; a mesh as small as the candidates cost 1.6 copies (simulated)."""

    neighbours: int = 16
    """Links every node wants; 8 to 32 are within noise, messages grow with it (simulated)."""

    accepted: int = 24
    accepted_starving: int = 40
    starving: int = 8
    """Neighbours beyond which a newcomer is sent on to others, unless it belongs to the mesh or has fewer than `starving`
    itself: work for each piece must not grow with the swarm; without the exception newcomers read 2.6 copies (simulated)."""

    declined: float = 30.0
    """Who has declined is not asked again for so long."""

    settle: float = 0.1
    """Between announcing and the first origin read, so that newcomers see one another; 0 to 0.3 alike in copies."""

    settle_bound: float = 1.5
    """A dial that has not answered by then holds nobody up."""

    stream_budget: int = 8
    """Origin reads at once over all candidates."""

    streams_alone: int = 4
    """At most so many at one node; one stream leaves a gap of a round trip between pieces."""

    backlog: int = 2
    """Own pieces nobody else has yet, at which a node stops reading the origin until they have spread."""

    lease_first: float = 3.0
    lease_least: float = 1.0
    lease_rate: int = 256 * 1024
    """First lease: max(3 s, piece / 256 KiB/s); later 4 x the owner's mean read time, between 1 s and that."""

    lease_slack: float = 0.5
    """Granted by everybody but the owner: the way of the claim and of the `have` that answers it."""

    lease_renewals: int = 3
    """A claim whose owner makes real progress may be renewed so often; a trickle may not."""

    claim_attempts: int = 8
    """Times an owner may give a piece up and claim it anew without having it: otherwise taking a claim back in time would
    keep a piece from everybody for ever, without a strike."""

    strikes: int = 2
    """Expired leases after which a node's claims are ignored for the task."""

    claims_per_owner: int = 6
    """Streams + 2: more live claims than an owner can read at once are a grab."""

    slow_factor: float = 3.0
    """A candidate whose claim-to-have times are this many medians steps down."""

    progress_lease: float = 6.0
    progress_lease_small: float = 2.0
    small_content: int = 8 * MIB
    progress_stagger: float = 0.5
    """Per rank, so that they do not all fire together (13 readers, 2.67 copies in one simulated run without)."""

    stuck_holder: float = 4.0
    stuck_piece_times: float = 24.0
    """A piece at one holder that spreads nothing for max(4 s, 24 piece times); 2 s fires on healthy nodes (1.13 copies)."""

    arriving: int = 5
    """Pieces arriving at once, after which nothing more is asked; neighbours send several at a time each, so they overlap."""

    outstanding: int = 10
    """Requests of one node that wait or arrive, at all neighbours together.  Simulated, 8 to no bound are alike; between real
    hosts, forty let a dozen senders meet at one downlink, and an eighth of all bytes was sent twice; with 14 (and eight
    arriving) twenty hosts took 4 % longer than with ten."""

    behind_extra: int = 5
    behind_step: float = 0.005
    """A node that has less than its neighbours have on average lets more arrive: one piece for each half of a hundredth of
    the content that it is behind, five at most (and twice as many outstanding).  Uploaders prefer what is rare, and what it
    lacks is not: of twenty hosts, one or two stayed behind with five at once and ended up to 4 s after the others, and with
    eight at once at all of them, those that were not behind got in one another's way (half a second at the median)."""

    overloaded: float = 0.5
    overloaded_piece_times: float = 6.0
    """A request that has waited so long does not count: with 200 nodes the ten were stuck in the queues of the few that
    everybody knows, and the last node took 2.2 instead of 1.4 times the floor (simulated)."""

    queued: int = 1
    queued_at_few: int = 8
    """Requests queued at each neighbour; more where `outstanding` ones find few neighbours, or each piece would wait for a
    round trip and a decision: of one neighbour, 64 MiB took 1.6 s.  Simulated, 1 and 2 are alike as long as a neighbour
    sends several at a time."""

    queued_overdue: int = 8
    """Requests at one neighbour with those that have waited too long (`overloaded`), which do not count as `queued`.  What was
    rare when it was asked for is not any more, and what is goes before it: with one request at each neighbour and all of
    them such, a node got nothing for half of the time (simulated with three uploads: 10 nodes, 500 MiB, last node 1.45 times
    the floor instead of 1.19)."""

    spare_arriving: int = 3
    """Pieces arriving at once, from which on nothing is asked for that waits elsewhere too: they fill the downlink, and what
    comes twice would only take its room (simulated: 2 % less time with 20 nodes and with 60; 1 stops too early)."""

    spare_after: float = 0.5
    spare_after_piece_times: float = 2.0
    """A request must have waited max(half a second, two piece times) before its piece is asked for elsewhere too.  Asked at
    once, two idle neighbours both begin, and neither hears in time that the other has: where twenty hosts shared two cores,
    a node received up to 180 of its 200 pieces twice, and the last one ended after 16.6 instead of 11.4 s (simulated, where
    nobody is late, the time is the same and 2 % of pieces are spared)."""

    endgame_holders: int = 3
    endgame_holders_starving: int = 16

    have_batch: float = 1.0
    """Batching of `have` for pieces that neighbours hold already: a second costs no time against half of one (simulated), for
    what is new also goes with every claim, and spares a seventh to a quarter of the frames, which is what many daemons on few
    cores spend their time on."""

    have_batch_per_piece: float = 0.005
    """Content of few pieces is over soon and has few frames: at most so long a batch for each of its pieces."""

    have_rare: int = 2
    """Pieces that came from a neighbour and that at most so many hold are told before the batch; those just read from the
    origin are told at once to everybody, as the answer to our claim.

    1 instead of 2 spares 11-15 % of the frames (simulated) and costs half a percent of the time between real hosts.
    """

    have_at_once: int = 8
    """Neighbours, drawn anew each time, that are told a rare piece before the batch.  More of them could not be sent it at
    once anyway: all of them instead of eight is 14-28 % more frames for the same time (simulated)."""

    have_late: float = 3.0
    """Batching of `have` towards neighbours that hold the piece themselves: it only refines their rarity counts."""

    tick: float = 0.5
    """How often decisions that depend on time alone are looked at."""

    peer_failures: int = 3
    """Refusals and missed deadlines in a row after which a neighbour is not asked for a while (libtorrent: 3)."""

    peer_pause: float = 10.0

    def queued_at_each(self, neighbours: int, outstanding: int) -> int:
        """Requests that may wait at each of so many neighbours, where `outstanding` may wait or arrive."""
        return max(self.queued, min(self.queued_at_few, outstanding // max(1, neighbours)))

    def have_batch_of(self, geometry: Geometry) -> float:
        return min(self.have_batch, self.have_batch_per_piece * geometry.piece_count)

    def first_lease(self, geometry: Geometry) -> float:
        return max(self.lease_first, geometry.piece_length / self.lease_rate)

    def progress_after(self, geometry: Geometry) -> float:
        return self.progress_lease_small if geometry.length < self.small_content else self.progress_lease
