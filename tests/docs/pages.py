"""The Markdown pages: where they are, their links, and the sessions in them that are run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_SESSION: Final = re.compile(r"<!-- tested -->\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(slots=True)
class Step:
    """A command as typed, and what the page says it prints."""

    command: str
    expected: list[str] = field(default_factory=list)


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of the links in a page."""
    return _LINK.findall(prose(text))


def anchors(text: str) -> set[str]:
    """What `#...` may name, as code hosts make it from headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def steps(text: str) -> Iterator[Step]:
    """The commands of all tested sessions of a page, in order."""
    for block in _SESSION.findall(text):
        step: Step | None = None
        for line in block.splitlines():
            if line.startswith("$ "):
                if step is not None:
                    yield step
                step = Step(line.removeprefix("$ "))
            elif step is not None:
                step.expected.append(line)
        if step is not None:
            yield step


def shape(lines: list[str]) -> list[str]:
    """What stays the same from run to run: no numbers, no ids, no places, no widths of columns."""
    text = "\n".join(line.rstrip() for line in lines)
    text = re.sub(r"\b[0-9a-f]{12,128}\b", "<id>", text)
    text = re.sub(r"(?<=on )/\S+", "<place>", text)
    text = re.sub(r"\d+(\.\d+)?( (B|KiB|MiB|GiB|TiB)\b)?", "<n>", text)
    return [" ".join(line.split()) for line in text.splitlines()]
