"""Who may know whom: imports point inward, and engines do no I/O, read no clock and draw from no global generator."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MAY_IMPORT = {
    "swarm": set(),
    "scheduler": {"swarm"},
    "cli": {"swarm", "scheduler"},
    "simulations": {"swarm", "scheduler"},
}

ENGINES = [
    "swarm/errors.py",
    "swarm/pieces.py",
    "swarm/proofs.py",
    "swarm/task.py",
    "swarm/wire.py",
    *(f"swarm/dht/{name}.py" for name in ("admission", "clock", "lookup", "messages", "own_addresses", "records")),
    *(f"swarm/dht/{name}.py" for name in ("routing", "rpc")),
    *(
        f"swarm/download/{name}.py"
        for name in ("bans", "claims", "cutting", "exchange", "members", "picker", "policy", "request")
    ),
    "swarm/mirror/setup.py",
    "swarm/origin/answers.py",
    "swarm/origin/retry.py",
    *(f"swarm/peer/{name}.py" for name in ("connection", "limits", "upload")),
    "swarm/store/eviction.py",
]

THE_WORLD = {
    "asyncio",
    "concurrent",
    "http",
    "httpx",
    "multiprocessing",
    "os",
    "pathlib",
    "secrets",
    "select",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "trio",
    "urllib.request",
}

OF_A_GENERATOR = {"Random"}
"""What may be used of `random`: a generator that somebody hands in."""


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of the modules imported anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(package: str, source: str) -> list[str]:
    """Imports of other packages of ours that this package may not make."""
    ours = set(MAY_IMPORT) | {"tests"}
    tops = {name.split(".")[0] for name in imports(ast.parse(source))}
    return sorted(tops & ours - MAY_IMPORT[package] - {package})


def reaching_out(source: str) -> list[str]:
    """What in an engine reaches into the world."""
    tree = ast.parse(source)
    found = {name for name in imports(tree) if any(name == part or name.startswith(part + ".") for part in THE_WORLD)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            found |= {f"random.{node.attr}"} if node.attr not in OF_A_GENERATOR else set()
        elif isinstance(node, ast.ImportFrom) and node.module == "random":
            found |= {f"random.{alias.name}" for alias in node.names} - {f"random.{name}" for name in OF_A_GENERATOR}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "print", "input"):
            found.add(node.func.id)
    return sorted(found)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_inward(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files or package == "scheduler"
    assert {str(path): crossed for path in files if (crossed := crossings(package, path.read_text()))} == {}


@pytest.mark.parametrize("path", ENGINES)
def test_an_engine_reaches_for_nothing(path: str) -> None:
    assert reaching_out((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import trio",
        "from trio.abc import Stream",
        "import os.path",
        "from time import monotonic",
        "import random; random.random()",
        "from random import shuffle",
        "open('x')",
        "from socket import socket",
        "from urllib import request",
    ],
)
def test_each_way_out_of_an_engine_would_be_noticed(line: str) -> None:
    assert reaching_out(line)


def test_an_import_from_above_would_be_noticed() -> None:
    assert crossings("swarm", "def f():\n    from cli.main import main") == ["cli"]
    assert crossings("simulations", "import tests.conftest") == ["tests"]
