"""Sizes, rates, durations, shares and endpoints: what a person writes, and back.

Standard library only: the command line prints with it and must start at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from swarm.errors import ConfigError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`host:port` as a person wrote it: a name or an address; IPv6 in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or self.host == "::1" or re.fullmatch(r"127(\.\d+){3}", self.host) is not None


def shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


_SIZES: Final = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1024 * GIB, "tib": 1024 * GIB, "tb": 1000**4,
}  # fmt: skip
_DURATIONS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_UNIT: Final = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*")


def parse_size(value: object, what: str = "size") -> int:
    """Bytes: a whole number, or text such as `"10GiB"` (1024) or `"10GB"` (1000).

    Raises:
        ConfigError: Neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _NUMBER_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _SIZES:
        raise ConfigError(f'{what} = {shown(value)}: expected a size, such as "512MiB" or "10GiB"')
    return int(float(match[1]) * _SIZES[match[2].lower()]) if "." in match[1] else int(match[1]) * _SIZES[match[2].lower()]


def parse_rate(value: object, what: str = "rate") -> int:
    """Bytes a second: as a size, or with `/s` behind it, or bits as networks count them (`"100Mbit/s"`).

    Raises:
        ConfigError: Neither.
    """
    if not isinstance(value, str):
        return parse_size(value, what)
    text = value.strip().removesuffix("/s")
    bits = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([KMGkmg]?)bit", text)
    if bits is not None:
        return int(float(bits[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[bits[2].lower()] / 8)
    try:
        return parse_size(text, what)
    except ConfigError as error:
        raise ConfigError(f'{what} = {shown(value)}: expected a rate, such as "50MiB/s" or "100Mbit/s"') from error


def parse_duration(value: object, what: str = "duration") -> float:
    """Seconds: a number, or text such as `"30s"`, `"500ms"`, `"2h"`.

    Raises:
        ConfigError: Neither.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    match = _NUMBER_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _DURATIONS:
        raise ConfigError(f'{what} = {shown(value)}: expected a duration, such as "30s" or "5m"')
    return float(match[1]) * _DURATIONS[match[2].lower()]


def parse_fraction(value: object, what: str = "share") -> float:
    """A share of one: a number, or text such as `"90%"`.

    Raises:
        ConfigError: Neither.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*(%?)\s*", value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f'{what} = {shown(value)}: expected a share, such as 0.9 or "90%"')
    return float(match[1]) / (100 if match[2] else 1)


def parse_endpoint(
    value: object, what: str = "address", *, default_port: int | None = None, allow_zero: bool = False
) -> Endpoint:
    """`host:port`, `[ipv6]:port`; with `default_port` the port may be missing.

    Raises:
        ConfigError: Not that, or the port is out of range.
    """
    if isinstance(value, Endpoint):
        return value
    text = value.strip() if isinstance(value, str) else ""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s\[\]:/@]*))(?::([0-9]{1,5}))?", text)
    host = (match[1] or match[2]) if match is not None else None
    if match is None or not host or (match[3] is None and default_port is None):
        hint = "write IPv6 in brackets, [::1]:7400" if text.count(":") > 1 and "[" not in text else "expected HOST:PORT"
        raise ConfigError(f"{what} = {shown(value)}: {hint}")
    port = int(match[3]) if match[3] is not None else int(default_port or 0)
    if port > 65535 or (port == 0 and not allow_zero):
        raise ConfigError(f"{what} = {shown(value)}: the port must be between {0 if allow_zero else 1} and 65535")
    return Endpoint(host, port)


def in_unit(number: float, unit: str) -> str:
    """A number as the configuration would write it: `30s`, `512MiB`, `0.9`."""
    match unit:
        case "duration":
            return f"{number:g}s"
        case "size" | "rate" if number:
            for name, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
                if number % factor == 0:
                    return f"{int(number // factor)}{name}" + ("/s" if unit == "rate" else "")
            return f"{int(number)}"
        case _:
            return f"{number:g}"


def human_size(count: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for name, factor in (("TiB", 1024 * GIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= factor:
            return f"{count / factor:.1f} {name}"
    return f"{int(count)} B"


def human_duration(seconds: float) -> str:
    """Seconds for people: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes} min"
