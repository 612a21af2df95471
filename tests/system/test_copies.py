"""Several hosts want one file: everybody gets exactly it, and the origin sends about one copy."""

from __future__ import annotations

import time

import pytest

from swarm.task import Geometry
from tests.system.origin import MIB
from tests.system.processes import last_done, prepare, start_together
from tests.system.scene import scene

pytestmark = pytest.mark.system

LENGTH = 16 * MIB
PIECE = Geometry.of(LENGTH).piece_length
ONE_PIECE = PIECE / LENGTH  # at this length one repeated piece is 1.6 % of a copy


def test_eight_hosts_that_fetch_at_once_cost_the_origin_one_copy() -> None:
    with scene(8, LENGTH, rate="50mbit") as s:
        s.cluster.start_all()
        fetched = s.cluster.fetch_all(s.url, timeout=60)
        s.assert_all_have_it(fetched)
        s.cluster.stop()
        assert s.copies() <= 1.05 + ONE_PIECE
        assert sum(it.said["from_origin"] for it in fetched) <= (1.05 + ONE_PIECE) * LENGTH
        # Eight plain downloads over the origin's link would need 8 x 2.7 s.
        assert last_done([it.end for it in fetched]) < 11


def test_what_the_origin_logged_is_what_left_its_interface() -> None:
    with scene(4, LENGTH, rate="100mbit") as s:
        s.cluster.start_all()
        before = s.hosts.traffic()[0].sent
        fetched = s.cluster.fetch_all(s.url, timeout=60)
        s.assert_all_have_it(fetched)
        s.cluster.stop()
        left = s.hosts.traffic()[0].sent - before
        logged = s.copies() * LENGTH
        arrived = sum(it.said["from_origin"] for it in fetched)
        # nginx logs what it gave to the kernel: of a read that was broken off, more than was sent. What the hosts counted was.
        assert arrived <= logged
        assert arrived <= left <= 1.1 * logged + MIB


def test_hosts_that_join_one_by_one_cost_no_second_copy() -> None:
    """As many pieces as 64 MiB have: what the first host reads twice as the second one appears does not depend on them."""
    with scene(8, 4 * LENGTH, rate="100mbit") as s:
        s.cluster.start_all()
        fetches = [s.cluster.fetch(host, s.url) for host in s.hosts.each()]
        prepare([it.prepared for it in fetches])
        for fetch in fetches:
            fetch.prepared.release()
            time.sleep(0.5)
        s.assert_all_have_it(s.cluster.finish(fetches, 60))
        s.cluster.stop()
        assert s.copies() <= 1.02


def test_hosts_killed_in_the_middle_do_not_keep_the_others_from_the_file() -> None:
    with scene(8, 2 * LENGTH, rate="50mbit") as s:
        s.cluster.start_all()
        fetches = [s.cluster.fetch(host, s.url) for host in s.hosts.each()]
        start_together([it.prepared for it in fetches])
        time.sleep(2.7)  # half of what one copy needs over the origin's link
        for host in (2, 5):
            fetches[host - 1].prepared.kill()
            s.cluster.daemons[host].kill()
        fetched = s.cluster.finish(fetches, 90)
        survivors = [it for it in fetched if it.host not in (2, 5)]
        s.assert_all_have_it(survivors)
        s.cluster.stop()
        assert s.copies() <= 1.2
        assert last_done([it.end for it in survivors]) < 22  # the floor is 5.4 s


def test_both_sides_of_a_healed_partition_end_with_the_file() -> None:
    """The far side loses the origin and every host on this side while pieces flow."""
    near, far = (1, 2, 3), (4, 5, 6)
    with scene(6, LENGTH, rate="50mbit") as s:
        s.cluster.start_all()
        fetches = [s.cluster.fetch(host, s.url) for host in s.hosts.each()]
        start_together([it.prepared for it in fetches])
        time.sleep(1.5)
        s.hosts.split((0, *near), far)
        time.sleep(6)
        s.hosts.unsplit(*s.hosts.all())
        s.assert_all_have_it(s.cluster.finish(fetches, 90))
        s.cluster.stop()
        # Read again is at most what only the far side had: what passed the origin's link in 1.5 s, 0.56 of a copy.
        assert s.copies() <= 1.6


def test_a_second_fetch_sends_one_head_and_reads_nothing() -> None:
    with scene(1, LENGTH) as s:
        s.cluster.start_all()
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, timeout=30, name="first")])
        s.origin.forget()
        second = s.cluster.fetch_one(1, s.url, timeout=30, name="second")
        s.assert_all_have_it([second])
        assert [it.method for it in s.origin.requests()] == ["HEAD"]
        assert (second.said["from_origin"], second.said["from_local"]) == (0, LENGTH)


def test_a_second_fetch_by_digest_works_without_the_origin() -> None:
    with scene(1, LENGTH) as s:
        s.cluster.start_all()
        s.assert_all_have_it([s.cluster.fetch_one(1, s.url, timeout=30, name="first")])
        s.origin.stop()
        second = s.cluster.fetch_one(1, s.url, "--digest", s.file.digest, timeout=30, name="second")
        s.assert_all_have_it([second])
        assert (second.said["from_origin"], second.said["from_local"]) == (0, LENGTH)


def test_what_one_host_has_by_digest_others_get_without_the_origin() -> None:
    with scene(4, LENGTH) as s:
        s.cluster.start_all()
        by_digest = ("--digest", s.file.digest)
        s.assert_all_have_it([s.cluster.fetch_one(2, s.url, *by_digest, timeout=30, name="first")])
        s.origin.stop()
        fetched = s.cluster.fetch_all(s.url, *by_digest, timeout=30, on=[1, 3, 4])
        s.assert_all_have_it(fetched)
        assert [it.said["from_peers"] for it in fetched] == [LENGTH] * 3


def test_what_one_host_has_by_url_others_get_by_digest_without_the_origin() -> None:
    """Host 3 knows nothing but the digest, host 1 another URL of the same content."""
    with scene(3, LENGTH) as s:
        s.cluster.start_all()
        s.assert_all_have_it([s.cluster.fetch_one(2, s.url, timeout=30, name="first")])
        s.origin.stop()
        s.cluster.settle()  # it announces its second name when the fetch is over
        elsewhere = s.origin.url("elsewhere")
        by_digest = s.cluster.fetch_one(3, s.file.digest, timeout=30)
        by_other_url = s.cluster.fetch_one(1, elsewhere, "--digest", s.file.digest, timeout=30)
        s.assert_all_have_it([by_digest, by_other_url])
        assert [it.said["from_peers"] for it in (by_digest, by_other_url)] == [LENGTH] * 2


def test_a_small_file_is_read_at_most_twice_by_eight_hosts() -> None:
    with scene(8, 200 * 1024, rate="100mbit") as s:
        s.cluster.start_all()
        fetched = s.cluster.fetch_all(s.url, timeout=30)
        s.assert_all_have_it(fetched)
        s.cluster.stop()
        assert len(s.origin.reads(s.file.name)) <= 2
