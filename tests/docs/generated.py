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
from swarm.errors import SwarmError

ROOT: Final = Path(__file__).parent.parent.parent
REFERENCE: Final = ROOT / "docs/reference"

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


def message_table(kinds: Sequence[type[msgspec.Struct]]) -> str:
    """One row for each field of each message."""
    lines = ["| message | field | value |", "|---|---|---|"]
    for kind in kinds:
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        name = f"`{info.tag}`" if isinstance(info.tag, str) and not info.array_like else f"`{kind.__name__}`"
        if isinstance(info.tag, int):
            name += f" ({info.tag})"
        for number, field in enumerate(info.fields):
            optional = "" if field.required else ", may be absent"
            lines.append(f"| {name if number == 0 else ''} | `{field.encode_name}` | {_describe(field.type)}{optional} |")
    return "\n".join(lines)


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
            if isinstance(value, (int, float)) and not isinstance(value, bool):
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
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split()).replace("|", "\\|")
        yield target.id, text


def every_error() -> list[type[SwarmError]]:
    """Every deliberate exception, in the order of the source."""
    for package in (swarm, cli):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    found: list[type[SwarmError]] = []

    def collect(kind: type[SwarmError]) -> None:
        found.append(kind)
        for below in kind.__subclasses__():
            if below.__module__.startswith(("swarm.", "cli.")):
                collect(below)

    collect(SwarmError)
    return [kind for kind in found if not kind.__name__.startswith("_")]


def error_table() -> str:
    """Each kind with what it is a kind of, its exit code and what its docstring says."""
    lines = ["| kind | is a | exit code | what it means |", "|---|---|---|---|"]
    for kind in every_error():
        text = " ".join((kind.__doc__ or "").split("Attributes:")[0].split()).replace("|", "\\|")
        above = "" if kind is SwarmError else f"`{kind.__bases__[0].__name__}`"
        lines.append(f"| `{kind.__name__}` | {above} | {kind.exit_code} | {text} |")
    return "\n".join(lines)


def code_table(module_name: str, names: Sequence[str]) -> str:
    """Numbers on the wire and their names."""
    module: Any = importlib.import_module(module_name)
    texts = dict(_documented(module_name))
    lines = ["| number | name | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {getattr(module, name)} | `{name}` | {texts[name]} |" for name in names)])


PARTS: Final[dict[str, dict[str, Callable[[], str]]]] = {
    "wire.md": {
        "control": lambda: message_table(CONTROL),
        "signed": lambda: message_table(SIGNED),
        "channel": lambda: message_table(CHANNEL),
        "datagrams": lambda: message_table(DATAGRAMS),
        "datagram bodies": lambda: message_table(DATAGRAM_BODIES),
        "bounds": bound_table,
    },
    "errors.md": {
        "errors": error_table,
        "close codes": lambda: code_table(
            "swarm.peer.websocket", ("GOING_AWAY", "VIOLATION", "NOT_BINARY", "TOO_BIG", "REFUSED", "DUPLICATE", "FULL")
        ),
        "stored": lambda: code_table("swarm.dht.messages", ("STORED", "BAD_TOKEN", "OUTDATED", "FULL", "INVALID")),
    },
}


def filled(page: str, text: str) -> str:
    """The page with its generated parts as the code has them now."""
    for name, make in PARTS[page].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, middle, rest = text.partition(begin)
        if not middle or end not in rest:
            raise AssertionError(f"docs/reference/{page} has no part {name!r}")
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in PARTS:
        path = REFERENCE / page
        path.write_text(filled(page, path.read_text()))
