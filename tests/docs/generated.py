"""The parts of the reference that are written from the code: `python -m tests.docs.generated` rewrites them.

A page marks such a part with `<!-- begin NAME -->` and `<!-- end NAME -->`; a test fails when it differs from the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

import cli
import swarm
from swarm import wire
from swarm.dht import messages, records
from swarm.download import policy
from swarm.errors import SwarmError

ROOT: Final = Path(__file__).parent.parent.parent
DOCS: Final = ROOT / "docs"

CONTROL: Final = (
    wire.Hello, wire.Join, wire.Ask, wire.Have, wire.Lost, wire.SealOffer, wire.Claims, wire.Unclaim, wire.Leave, wire.Peers,
    wire.Ping, wire.Pong,
)  # fmt: skip
SIGNED: Final = (wire.Signed, wire.ProofBody, wire.SealBody, wire.ClaimBody)
CHANNEL: Final = (wire.ChannelOpen, wire.Request, wire.Cancel, wire.Reply)
DATAGRAMS: Final = (
    messages.Ping, messages.FindNode, messages.FindProviders, messages.Announce, messages.Withdraw, messages.Pong,
    messages.Contacts, messages.Providers, messages.Stored,
)  # fmt: skip
DATAGRAM_BODIES: Final = (messages.ContactBody, records.ProviderBody, records.WithdrawBody)

BOUNDED: Final = (
    "swarm.wire",
    "swarm.peer.websocket",
    "swarm.peer.connection",
    "swarm.peer.pieces_channel",
    "swarm.dht.messages",
    "swarm.dht.records",
    "swarm.dht.admission",
)
"""Modules whose numbers a peer can observe."""

STATUSES: Final = ("OK", "NOT_HELD", "BUSY", "REFUSED", "CANCELLED")
CLOSE_CODES: Final = ("GOING_AWAY", "VIOLATION", "NOT_BINARY", "TOO_BIG", "REFUSED", "DUPLICATE", "FULL")
STORED: Final = ("STORED", "BAD_TOKEN", "OUTDATED", "FULL", "INVALID")
CODES: Final = {"swarm.wire": STATUSES, "swarm.peer.websocket": CLOSE_CODES, "swarm.dht.messages": STORED}
"""Numbers that are names, not bounds."""

TEXTS: Final = {
    "swarm.wire.PROTOCOL_VERSION": "Another one is refused, and named.",
    "swarm.wire.MAX_DEPTH": "Nesting of CBOR; ours has 4. Against recursion.",
    "swarm.wire.MAX_CHANNEL_FRAME_BYTES": "A reply with a proof and a certificate has below 5 KiB.",
    "swarm.wire.OK": "The bytes follow.",
    "swarm.wire.NOT_HELD": "The piece is not (or no longer) held, or nobody valid vouches for it.",
    "swarm.wire.BUSY": "The queue is full; also what a missed deadline counts as.",
    "swarm.wire.REFUSED": "The task is not shared with this peer, or no such bytes exist.",
    "swarm.wire.CANCELLED": "Withdrawn by the asker before it started.",
    "swarm.peer.websocket.GOING_AWAY": "The node stops, or needs this connection no more.",
    "swarm.peer.websocket.VIOLATION": "The peer broke the protocol.",
    "swarm.peer.websocket.NOT_BINARY": "A text frame.",
    "swarm.peer.websocket.TOO_BIG": "A frame longer than `MAX_FRAME_BYTES`.",
    "swarm.peer.connection.PING_SECONDS": "Silence after which a peer is pinged.",
    "swarm.peer.connection.DEAD_SECONDS": "Silence after which it is dead: a host that vanished sends no FIN.",
    "swarm.peer.connection.MAX_QUEUED_MESSAGES": "As the next one.",
    "swarm.peer.connection.MAX_SKEW_SECONDS": "Clocks further apart are warned about.",
    "swarm.peer.pieces_channel.TLS_RECORD": "First byte of a TLS connection, as against `S` of the magic.",
    "swarm.peer.pieces_channel.NONCE_BYTES": "Fresh for each channel, so that an opening cannot be replayed.",
    "swarm.dht.messages.VERSION": "First byte of a datagram.",
    "swarm.dht.messages.MAC_BYTES": "BLAKE2b, keyed with the group secret.",
    "swarm.dht.messages.HEADER_BYTES": "Version, epoch and MAC.",
    "swarm.dht.messages.MAX_RECORD_BYTES": "Keeps several records in one datagram.",
    "swarm.dht.messages.TRANSACTION_BYTES": "Unguessable, so that nobody answers in another's place.",
    "swarm.dht.messages.TOKEN_BYTES": "Unguessable, for ten minutes.",
    "swarm.dht.messages.MAX_CONTACTS": "Twice the k of the table.",
    "swarm.dht.messages.MAX_RECORDS": "More than fit in a datagram.",
    "swarm.dht.messages.STORED": "It is kept.",
    "swarm.dht.messages.FULL": "No room: a quota of the key, the signer or the source, or the store.",
    "swarm.dht.messages.INVALID": "Expired, from the future, or not to be kept.",
    "swarm.dht.records.MAX_PER_KEY": "One popular task must not fill a store.",
    "swarm.dht.records.MAX_RECORDS": "Memory; the keys farthest from the node go first.",
    "swarm.dht.records.MAX_TOMBSTONES": "Memory of withdrawals.",
    "swarm.dht.admission.UNPROVEN_PER_SECOND": "Datagrams to one unproven address.",
    "swarm.dht.admission.PROVEN_PER_SECOND": "A proven address too can have its datagrams replayed at it.",
    "swarm.dht.admission.PROOF_LIFETIME": "Addresses change hands.",
}
SENTENCES: Final = {
    "Have": "I hold these pieces too now, verified.",
    "Lost": "I no longer hold these: they rotted, or were evicted.",
    "Leave": "I do not take part in this task (any more).",
    "Ping": "Are you there?",
    "Pong": "Answer to `ping`, with its nonce.",
    "Contacts": "Answer to `FindNode`: the nearest contacts.",
}
"""Said here where the code says nothing."""


def message_table(kinds: Sequence[type[msgspec.Struct]]) -> str:
    """One row for each field of each message."""
    lines = ["| message | field | value |", "|---|---|---|"]
    for kind in kinds:
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        name = f"`{info.tag}`" if isinstance(info.tag, str) and not info.array_like else f"`{kind.__name__}`"
        if isinstance(info.tag, int):
            name += f" ({info.tag})"
        lines.append(f"| **{name}** | | {_sentence(kind)} |")
        for field in info.fields:
            optional = "" if field.required else ", may be absent"
            lines.append(f"| | `{field.encode_name}` | {_describe(field.type)}{optional} |")
    return "\n".join(lines)


def _sentence(kind: type[msgspec.Struct]) -> str:
    """The first paragraph of the docstring, on one line."""
    text = kind.__doc__ or SENTENCES[kind.__name__]
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")


def _describe(kind: msgspec.inspect.Type) -> str:
    """A type and its bounds in words."""
    match kind:
        case msgspec.inspect.BytesType(min_length=least, max_length=most):
            return f"bytes, {_span(least, most)}"
        case msgspec.inspect.StrType(max_length=most):
            return f"text, {_span(None, most)} characters"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            word = "integer" if isinstance(kind, msgspec.inspect.IntType) else "number"
            return word + _range(kind)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.ListType(item_type=item, max_length=most, min_length=least):
            return f"list, {_span(least, most)}, of: {_describe(item)}"
        case msgspec.inspect.TupleType(item_types=items):
            return "pair of: " + "; ".join(_describe(item) for item in items)
        case msgspec.inspect.StructType(cls=cls):
            return f"`{cls.__name__}`"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_describe(one) for one in types)
        case msgspec.inspect.NoneType():
            return "null"
    raise AssertionError(f"no words for {kind}")


def _span(least: int | None, most: int | None) -> str:
    if most is None:
        raise AssertionError("a length without a bound")
    return f"{most:,}" if least == most else f"{least:,} to {most:,}" if least else f"at most {most:,}"


def _range(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    low = f"at least {_number(kind.ge)}" if kind.ge is not None else f"above {_number(kind.gt)}" if kind.gt is not None else ""
    high = f"at most {_number(kind.le)}" if kind.le is not None else f"below {_number(kind.lt)}" if kind.lt is not None else ""
    both = [part for part in (low, high) if part]
    return ", " + ", ".join(both) if both else ""


def _number(value: float | None) -> str:
    assert value is not None
    power = int(value).bit_length() - 1
    return f"2^{power}" if power >= 20 and value == 1 << power else f"{value:,}" if value < 1e9 else f"{value:g}"


def bound_table() -> str:
    """Every public number of the modules that speak to others, with the reason that stands beside it."""
    lines = ["| bound | value | why |", "|---|---|---|"]
    for module_name in BOUNDED:
        module = importlib.import_module(module_name)
        for name, text in _documented(module_name):
            value = getattr(module, name)
            if name not in CODES.get(module_name, ()) and isinstance(value, (int, float)):
                lines.append(f"| `{module_name.removeprefix('swarm.')}.{name}` | {value:,} | {text} |")
    return "\n".join(lines)


def _documented(module_name: str) -> Iterator[tuple[str, str]]:
    """Public constants of a module in order, with the text below each, on one line."""
    module = importlib.import_module(module_name)
    body = ast.parse(inspect.getsource(module)).body
    texts = [*body[1:], None]
    for node, following in zip(body, texts, strict=True):
        if not isinstance(node, (ast.AnnAssign, ast.Assign)):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if not isinstance(target, ast.Name) or not re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id):
            continue
        yield target.id, _text_below(following) or TEXTS.get(f"{module_name}.{target.id}", "")


def every_error() -> list[type[SwarmError]]:
    """Every deliberate exception: those of `swarm.errors` in its order, then those of other modules in theirs."""
    for package in (swarm, cli):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    found: list[type[SwarmError]] = []

    def collect(kind: type[SwarmError]) -> None:
        found.append(kind)
        # Not in the order of `__subclasses__`: that is the order in which somebody imported them.
        for below in sorted(kind.__subclasses__(), key=_place):
            if below.__module__.startswith(("swarm.", "cli.")):
                collect(below)

    collect(SwarmError)
    return [kind for kind in found if not kind.__name__.startswith("_")]


def _place(kind: type[SwarmError]) -> tuple[bool, str, int]:
    return kind.__module__ != SwarmError.__module__, kind.__module__, inspect.getsourcelines(kind)[1]


def error_table() -> str:
    """Each kind with what it is a kind of, its exit code and what its docstring says."""
    lines = ["| kind | is a | exit code | what it means |", "|---|---|---|---|"]
    for kind in every_error():
        text = " ".join((kind.__doc__ or "").split("Attributes:")[0].split()).replace("|", "\\|")
        above = "" if kind is SwarmError else f"`{kind.__bases__[0].__name__}`"
        lines.append(f"| `{kind.__name__}` | {above} | {kind.exit_code} | {text} |")
    return "\n".join(lines)


def code_table(module_name: str) -> str:
    """Numbers on the wire and their names."""
    module: Any = importlib.import_module(module_name)
    texts = dict(_documented(module_name))
    lines = ["| number | name | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {getattr(module, name)} | `{name}` | {texts[name]} |" for name in CODES[module_name])])


def policy_table() -> str:
    """Every number of the exchange, with what stands below it in the source."""
    tree = ast.parse(inspect.getsource(policy))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    standard = policy.Policy()
    lines = ["| number | value | why |", "|---|---|---|"]
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines.append(f"| `{node.target.id}` | {getattr(standard, node.target.id):,} | {_text_below(following)} |")
    return "\n".join(lines)


def _text_below(following: ast.stmt | None) -> str:
    """The documentation of an attribute, on one line."""
    if not isinstance(following, ast.Expr) or not isinstance(following.value, ast.Constant):
        return ""
    return " ".join(str(following.value.value).split()).replace("|", "\\|")


PARTS: Final[dict[str, dict[str, Callable[[], str]]]] = {
    "reference/wire.md": {
        "control": lambda: message_table(CONTROL),
        "signed": lambda: message_table(SIGNED),
        "channel": lambda: message_table(CHANNEL),
        "datagrams": lambda: message_table(DATAGRAMS),
        "datagram bodies": lambda: message_table(DATAGRAM_BODIES),
        "bounds": bound_table,
    },
    "reference/errors.md": {
        "errors": error_table,
        "statuses": lambda: code_table("swarm.wire"),
        "close codes": lambda: code_table("swarm.peer.websocket"),
        "stored": lambda: code_table("swarm.dht.messages"),
    },
    "design/exchange.md": {"policy": policy_table},
}


def filled(page: str, text: str) -> str:
    """The page with its generated parts as the code has them now."""
    for name, make in PARTS[page].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, middle, rest = text.partition(begin)
        if not middle or end not in rest:
            raise AssertionError(f"docs/{page} has no part {name!r}")
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        path = DOCS / page
        path.write_text(filled(page, path.read_text()))
