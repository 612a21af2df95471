"""The routing table: kademlia's Node, NodeHeap, KBucket and RoutingTable, corrected and bounded.

What is different from kademlia 2.2.3, and why:

- Ranges are inclusive at both ends and compared so (there, the last id of each bucket falls into the next one).
- No clock is read and no task started inside: `now` is passed in, a full bucket says so to its caller.
- Neighbours are the nearest of the whole table (there, of the first buckets walked, which are not always nearest).
- A host has a bounded number of slots, an address and port exactly one (there, one address took 675).
- There is no cache of replacements: their proofs would be stale by the time they are needed.
- Only contacts that proved their id and address are added; that is the caller's duty (`rpc.Engine`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from kademlia.node import Node, NodeHeap
from kademlia.routing import KBucket, RoutingTable

from swarm.dht.addresses import Scope, scope_of, slots_of
from swarm.edges import Address

ID_BITS: Final = 160

MAX_CONTACTS: Final = 1024
"""Each contact costs a ping every ten minutes: at most two a second for the whole table."""

SILENCE: Final = 300.0
"""Seconds for which a contact that did not answer is neither asked nor passed on."""
MAX_SILENT: Final = 4096


class Contact(Node):  # type: ignore[misc]  # kademlia is untyped
    """A node of the DHT: id, address, and when it was last heard."""

    id: bytes
    long_id: int

    def __init__(self, node_id: bytes, address: Address, last_seen: float = 0.0) -> None:
        super().__init__(node_id, address.host, address.port)
        self.address = address
        self.last_seen = last_seen

    def distance(self, target: int) -> int:
        return self.long_id ^ target


class Bucket(KBucket):  # type: ignore[misc]  # kademlia is untyped
    """Contacts whose ids are in `range`, both ends included; `nodes` from least to most recently proven."""

    range: tuple[int, int]
    nodes: OrderedDict[bytes, Contact]

    def touch_last_updated(self) -> None:
        """The table's owner decides when to refresh; the original reads the clock here."""

    def split(self) -> tuple[Bucket, Bucket]:
        low, high = self.range
        middle = (low + high) // 2
        one, two = Bucket(low, middle, self.ksize), Bucket(middle + 1, high, self.ksize)
        for node in self.nodes.values():
            (one if node.long_id <= middle else two).add_node(node)
        return one, two

    @property
    def is_full(self) -> bool:
        return bool(len(self.nodes) >= self.ksize)


class Table(RoutingTable):  # type: ignore[misc]  # kademlia is untyped
    """Contacts that proved themselves, nearest ids in the finest detail."""

    buckets: list[Bucket]

    def __init__(self, own_id: bytes, k: int, *, max_contacts: int = MAX_CONTACTS) -> None:
        self._max_contacts = max_contacts
        self._by_address: dict[Address, Contact] = {}
        self._per_host: dict[str, int] = {}
        self._silent: OrderedDict[Address, float] = OrderedDict()
        super().__init__(None, k, Node(own_id))

    def flush(self) -> None:
        self.buckets = [Bucket(0, (1 << ID_BITS) - 1, self.ksize)]

    def __len__(self) -> int:
        return len(self._by_address)

    def get_bucket_for(self, node: Node) -> int:
        low, high = 0, len(self.buckets)
        while high - low > 1:
            middle = (low + high) // 2
            if self.buckets[middle].range[0] <= node.long_id:
                low = middle
            else:
                high = middle
        return low

    def get(self, node_id: bytes) -> Contact | None:
        contact: Contact | None = self.buckets[self.get_bucket_for(Node(node_id))].nodes.get(node_id)
        return contact

    def at(self, address: Address) -> Contact | None:
        return self._by_address.get(address)

    def contacts(self) -> list[Contact]:
        return [contact for bucket in self.buckets for contact in bucket.nodes.values()]

    def wants(self, node_id: bytes, address: Address) -> bool:
        """Whether it is worth asking this node for its proof: a free slot for its host, and one in its bucket."""
        if node_id == self.node.id:
            return False
        known = self.get(node_id)
        if known is not None:
            return bool(known.address != address)
        if address not in self._by_address and self._per_host.get(address.host, 0) >= slots_of(address.host):
            return False
        bucket = self.buckets[self.get_bucket_for(Node(node_id))]
        return not bucket.is_full or self._may_split(bucket)

    def add(self, contact: Contact) -> bool:
        """Enter a proven contact, in place of whoever was known under its id or its address.

        Whoever proved itself last at an address is who lives there now: a daemon restarted with a new key, or an
        attacker changing its mind, who gains nothing, as it had that slot before.
        """
        if contact.id == self.node.id:
            return False
        if (old := self.get(contact.id)) is not None:
            self._take_out(old)
        if (previous := self._by_address.get(contact.address)) is not None:
            self._take_out(previous)
        if self._per_host.get(contact.address.host, 0) >= slots_of(contact.address.host):
            return False
        bucket = self.buckets[self.get_bucket_for(contact)]
        while bucket.is_full and self._may_split(bucket):
            self.split_bucket(self.buckets.index(bucket))
            bucket = self.buckets[self.get_bucket_for(contact)]
        if bucket.is_full:
            return False
        bucket.add_node(contact)
        self._by_address[contact.address] = contact
        self._per_host[contact.address.host] = self._per_host.get(contact.address.host, 0) + 1
        self._silent.pop(contact.address, None)
        return True

    def remove(self, contact: Contact) -> None:
        """Forget a contact, if it is still the one known under its id."""
        if self.get(contact.id) is contact:
            self._take_out(contact)

    def nearest(self, target: bytes, count: int, *, asker: str | None = None) -> list[Contact]:
        """The nearest contacts to a target.

        Args:
            asker: The host they are for: one elsewhere can do nothing with our loopback addresses.
        """
        point = int.from_bytes(target, "big")
        contacts: Iterable[Contact] = self._by_address.values()
        if asker is not None and scope_of(asker) is not Scope.LOOPBACK:
            contacts = (contact for contact in contacts if scope_of(contact.address.host) is not Scope.LOOPBACK)
        return heapq.nsmallest(count, contacts, key=lambda contact: contact.long_id ^ point)

    def sparse(self) -> list[bytes]:
        """An id in each subtree beside our own path of which fewer than k / 2 contacts are known.

        The subtrees are those that Kademlia's buckets stand for: ids that share exactly the first n bits with ours, down
        to the depth of our own bucket.
        """
        low, high = self.buckets[self.get_bucket_for(self.node)].range
        depth = ID_BITS - (high - low + 1).bit_length() + 1
        known = [0] * (ID_BITS + 1)
        for contact in self._by_address.values():
            known[ID_BITS - (contact.long_id ^ self.node.long_id).bit_length()] += 1
        return [
            (self.node.long_id ^ 1 << (ID_BITS - 1 - bit)).to_bytes(20, "big")
            for bit in range(depth)
            if known[bit] < self.ksize // 2
        ]

    def heard(self, address: Address, now: float) -> None:
        """An answer came from there."""
        self._silent.pop(address, None)
        if (contact := self._by_address.get(address)) is not None:
            contact.last_seen = now

    def fell_silent(self, address: Address, now: float) -> Contact | None:
        """No answer came from there, and not to the repeated question either; the contact that is dropped for it."""
        self._silent[address] = now + SILENCE
        self._silent.move_to_end(address)
        while len(self._silent) > MAX_SILENT:
            self._silent.popitem(last=False)
        contact = self._by_address.get(address)
        if contact is not None:
            self._take_out(contact)
        return contact

    def is_silent(self, address: Address, now: float) -> bool:
        until = self._silent.get(address)
        if until is None:
            return False
        if until <= now:
            del self._silent[address]
            return False
        return True

    def _may_split(self, bucket: Bucket) -> bool:
        """Section 4.2 of the paper: our own bucket always, the others down to a depth that is a multiple of 5."""
        if bucket.range[0] == bucket.range[1]:
            return False
        if bucket.has_in_range(self.node):
            return True
        return len(self) < self._max_contacts and bool(bucket.depth() % 5)

    def _take_out(self, contact: Contact) -> None:
        self.remove_contact(contact)
        del self._by_address[contact.address]
        left = self._per_host[contact.address.host] - 1
        if left:
            self._per_host[contact.address.host] = left
        else:
            del self._per_host[contact.address.host]


class Shortlist(NodeHeap):  # type: ignore[misc]  # kademlia is untyped
    """Candidates of one lookup, nearest first, with no more of one host than a table would take.

    Its size is bounded by how often a lookup asks (`lookup.MAX_QUERIES`) and what one answer may name.
    """

    heap: list[tuple[int, Contact]]

    def __init__(self, target: bytes, k: int) -> None:
        super().__init__(Node(target), k)
        self._ids: set[bytes] = set()
        self._addresses: set[Address] = set()
        self._per_host: dict[str, int] = {}

    def offer(self, contact: Contact) -> bool:
        """Take a candidate in; `False` if it is known, or its host has its share already."""
        host = contact.address.host
        if contact.id in self._ids or contact.address in self._addresses or self._per_host.get(host, 0) >= slots_of(host):
            return False
        self._ids.add(contact.id)
        self._addresses.add(contact.address)
        self._per_host[host] = self._per_host.get(host, 0) + 1
        heapq.heappush(self.heap, (self.node.long_id ^ contact.long_id, contact))
        return True

    def drop(self, contact: Contact) -> None:
        """It did not answer: the next one takes its place.

        Its address is not taken in again, its id is: whoever named it may have lied about where it lives.
        """
        self.remove([contact.id])
        self._ids.discard(contact.id)

    def nearest(self) -> list[Contact]:
        """The k nearest that have not been dropped."""
        return list(self)
