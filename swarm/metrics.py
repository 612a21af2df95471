"""Every metric, unit in the name.

Parts of the node count in plain integers; nothing here runs until somebody asks, so a metric costs a transfer nothing.
`prometheus_client` is imported at the first scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric

DURATION_BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""Upper bounds, seconds: from a file that is there already to a model over a thin line."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric: its kind (`counter`, `gauge`, `histogram`), what it says, and its labels."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()


METRICS: Final = (
    Declared("swarm_build_info", "gauge", "Always 1; the labels say version and network.", ("version", "network")),
    Declared("swarm_uptime_seconds", "gauge", "Since this node became ready."),
    Declared("swarm_received_bytes_total", "counter", "Verified content, by source: peers, origin, local.", ("source",)),
    Declared("swarm_received_pieces_total", "counter", "Verified pieces, by source.", ("source",)),
    Declared("swarm_sent_bytes_total", "counter", "Content given to peers."),
    Declared("swarm_sent_pieces_total", "counter", "Pieces given to peers."),
    Declared("swarm_origin_reads_total", "counter", "Pieces read from the origin, by why this node did.", ("reason",)),
    Declared("swarm_fetches_total", "counter", "Fetches that ended, by result: ok or the kind of error.", ("result",)),
    Declared("swarm_fetch_duration_seconds", "histogram", "From the request to complete and verified, fetches that succeeded."),
    Declared("swarm_verification_failures_total", "counter", "Pieces whose bytes did not match what their sender vouched for."),
    Declared("swarm_wasted_pieces_total", "counter", "Pieces that came although they were already held."),
    Declared("swarm_lies_total", "counter", "Signed statements that turned out false."),
    Declared("swarm_bans_total", "counter", "Members this node stopped dealing with for a time."),
    Declared("swarm_peers", "gauge", "Connections to other members."),
    Declared("swarm_peer_events_total", "counter", "What the peer layer counted, by event.", ("event",)),
    Declared("swarm_dht_contacts", "gauge", "Contacts in the routing table."),
    Declared("swarm_dht_events_total", "counter", "What the DHT counted (messages, timeouts, refusals), by event.", ("event",)),
    Declared("swarm_announcements", "gauge", "Names this node announces; content of a URL has two, the other is its digest."),
    Declared("swarm_tasks", "gauge", "Tasks in the store, by state: complete or partial.", ("state",)),
    Declared("swarm_store_bytes", "gauge", "Room that content takes on the disk."),
    Declared("swarm_store_quota_bytes", "gauge", "Room that content may take; 0 without a quota."),
    Declared("swarm_store_free_bytes", "gauge", "Room free on the store's disk."),
    Declared("swarm_store_events_total", "counter", "What the store counted (evictions, rotten pieces), by event.", ("event",)),
    Declared("swarm_control_requests", "gauge", "Commands being answered on the control socket."),
    Declared("swarm_mirror_answers_total", "counter", "Answers of the mirror.", ("registry", "kind", "status")),
    Declared("swarm_mirror_sent_bytes_total", "counter", "Of blobs: from store, peers, origin.", ("registry", "source")),
    Declared("swarm_mirror_saved_bytes_total", "counter", "Of them, not read from the registry.", ("registry",)),
    Declared("swarm_mirror_first_byte_seconds", "histogram", "From the request for a blob to its first byte."),
    Declared("swarm_mirror_stale_tags_total", "counter", "Answered while the registry did not.", ("registry",)),
    Declared("swarm_mirror_cut_bodies_total", "counter", "Blobs that ended early, by reason.", ("reason",)),
    Declared("swarm_mirror_clients", "gauge", "Connections of runtimes to the mirror."),
    Declared("swarm_process_resident_bytes", "gauge", "Memory of this process."),
    Declared("swarm_process_open_descriptors", "gauge", "Open descriptors of this process."),
    Declared("swarm_process_cpu_seconds_total", "counter", "Processor time of this process, user and system."),
)  # fmt: skip

Sample = tuple[str, Mapping[str, str], float]
"""Name, labels, value."""


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound; the last count is of what lies above all bounds."""

    bounds: tuple[float, ...] = DURATION_BOUNDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of upper bound and how many are at most that, as the exposition format wants them."""
        running = 0
        pairs = []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            running += count
            pairs.append((bound, float(running)))
        return pairs


class Measured(Protocol):
    """The node, as the metrics see it."""

    @property
    def histograms(self) -> Mapping[str, Histogram]:
        """The declared histograms there are, by name."""
        ...

    def samples(self) -> Iterable[Sample]:
        """Values of the declared counters and gauges now."""
        ...


class Scrape:
    """A `prometheus_client` collector over one node; register it with a registry of its own."""

    def __init__(self, node: Measured) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        values: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for name, labels, value in self._node.samples():
            values.setdefault(name, []).append((labels, value))
        for metric in METRICS:
            if metric.kind == "histogram":
                histogram = self._node.histograms.get(metric.name)
                if histogram is not None:
                    yield HistogramMetricFamily(
                        metric.name, metric.text, buckets=histogram.cumulative(), sum_value=histogram.total
                    )
                continue
            kind: Any = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.text, labels=metric.labels)
            for labels, value in values.get(metric.name, []):
                family.add_metric([labels[label] for label in metric.labels], value)
            yield family


def exposition(node: Measured) -> bytes:
    """The page at `/metrics`: text format 0.0.4."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Scrape(node))
    return generate_latest(registry)


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def reference() -> str:
    """The table of metrics in `docs/reference/http.md`."""
    lines = ["| metric | kind | labels | what it says |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.text} |")
    return "\n".join(lines) + "\n"
