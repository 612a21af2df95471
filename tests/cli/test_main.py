"""`swarm` itself: help, usage errors, exit codes, and that no error is more than a line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from cli import main as cli_main
from cli.main import COMMANDS, run
from swarm import errors
from swarm.errors import SwarmError

MAX_HELP_SECONDS = 0.3


def said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_names_every_command_and_exit_code(capsys):
    assert run(["--help"]) == 0
    out, err = said(capsys)
    for name in COMMANDS:
        assert f"  {name} " in out
    for code in ("3 content did not match", "6 daemon unreachable", "8 origin unreachable", "130 interrupted"):
        assert code in out
    assert err == ""


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_with_an_example(capsys, name):
    assert run([name, "--help"]) == 0
    out, _ = said(capsys)
    assert "Examples:" in out
    assert f"swarm {name}" in out
    command = cli_main.root.get_command(click.Context(cli_main.root), name)
    assert isinstance(command, click.Group) == ("COMMAND [ARGS]" in out)


def _leaves(command, path=()):
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from _leaves(child, (*path, name))
    else:
        yield path, command


def test_every_command_takes_json_and_every_option_says_what_it_does():
    for path, command in _leaves(cli_main.root):
        options = [param for param in command.params if isinstance(param, click.Option)]
        if path != ("daemon",):
            assert any("--json" in option.opts for option in options), path
        for option in options:
            assert option.help, (path, option.opts)


def test_the_version_is_the_packages(capsys):
    from swarm import __version__

    assert run(["--version"]) == 0
    assert said(capsys)[0] == f"swarm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ftch"], "no command 'ftch'; did you mean fetch? (see swarm --help)"),
        (["xyzzy"], "no command 'xyzzy'"),
        (["fetch"], "Missing argument 'URL|DIGEST' (see swarm fetch --help)"),
        (["fetch", "http://h/"], "Missing option '-o'"),
        (["fetch", "http://h/", "-o", "x", "--nope"], "No such option '--nope'"),
        (["daemon", "extra"], "unexpected extra argument"),
        (["task", "show"], "Missing argument 'TASK'"),
        (["--nope"], "No such option '--nope'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, text):
    assert run(arguments) == 2
    out, err = said(capsys)
    assert text in err
    assert err.startswith("swarm: ")
    assert err.count("\n") == 1
    assert out == ""


def test_wrong_usage_with_json_is_an_object_too(capsys):
    assert run(["fetch", "--json"]) == 2
    out, err = said(capsys)
    answer = json.loads(out)
    assert (answer["error"], answer["exit_code"]) == ("ConfigError", 2)
    assert answer["message"] in err


def test_no_arguments_show_help(capsys):
    assert run([]) == 2
    assert "Commands:" in said(capsys)[1]


def test_every_deliberate_error_becomes_its_exit_code_and_one_line(capsys, monkeypatch):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SwarmError)]
    documented = {1, 2, 3, 4, 5, 6, 7, 8, 130}
    for kind in kinds:

        def fail(*_, kind=kind, **__):
            raise kind("what happened,\nand what to do")

        monkeypatch.setattr(cli_main.root, "main", fail)
        assert run(["status", "--json"]) == kind.exit_code
        assert kind.exit_code in documented
        out, err = said(capsys)
        assert err == "swarm: what happened, and what to do\n"
        assert json.loads(out) == {
            "error": kind.__name__,
            "message": "what happened,\nand what to do",
            "exit_code": kind.exit_code,
        }
    assert {kind.exit_code for kind in kinds} == documented


def test_a_bug_is_a_line_too_and_its_traceback_is_there_when_asked_for(capsys, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli_main.root, "main", fail)
    assert run(["status"]) == 1
    assert said(capsys)[1] == "swarm: internal error: ZeroDivisionError: oops (SWARM_DEBUG=1 shows where)\n"
    monkeypatch.setenv("SWARM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["status"])


def test_control_characters_from_elsewhere_do_not_reach_the_terminal(capsys, monkeypatch):
    def fail(*_, **__):
        raise SwarmError("origin said \x1b[2J\x07 no\u202e")

    monkeypatch.setattr(cli_main.root, "main", fail)
    run(["status"])
    _, err = said(capsys)
    assert "\x1b" not in err
    assert "\u202e" not in err


def test_ctrl_c_is_130(capsys, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main.root, "main", fail)
    assert run(["status"]) == 130
    assert said(capsys)[1] == "swarm: interrupted\n"


def _imported(*arguments):
    """Modules imported by a command that fails early or prints help."""
    program = f"import sys\nfrom cli.main import run\nrun({list(arguments)!r})\nprint(' '.join(sys.modules), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True)
    return set(ended.stderr.splitlines()[-1].split())


HEAVY = {
    "trio",
    "cbor2",
    "msgspec",
    "structlog",
    "rich",
    "httpx",
    "cryptography",
    "starlette",
    "prometheus_client",
    "asyncio",
    "sqlite3",
}


def test_the_road_of_help_and_of_a_fetch_avoids_heavy_imports(tmp_path):
    assert not _imported("--help") & HEAVY
    assert not _imported("fetch", "--help") & HEAVY
    # With a daemon there is nothing more to import: see the fetch of tests/cli/test_fetch.py.
    assert not _imported("status", "--data-dir", str(tmp_path)) & HEAVY


def test_help_is_there_at_once():
    """The best of three: the machine may be busy, the command may not."""
    best = 9.0
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "cli.main", "--help"], stdout=subprocess.DEVNULL, timeout=20, check=True)
        best = min(best, time.monotonic() - began)
    assert best <= MAX_HELP_SECONDS


def test_whoever_reads_the_output_may_go_away():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-m", "cli.main", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=20)
    os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == b""


DOCS = Path(__file__).parent.parent.parent / "docs/reference"


def test_the_reference_of_the_command_line_is_what_the_commands_say():
    from cli.reference import reference

    assert (DOCS / "cli.md").read_text() == reference(), "run: python -m cli.reference > docs/reference/cli.md"


def test_the_reference_of_metrics_is_what_the_code_says():
    from swarm.metrics import reference

    assert reference() in (DOCS / "http.md").read_text()


def test_the_reference_of_http_names_every_route():
    from swarm.http import OPENAPI

    page = (DOCS / "http.md").read_text()
    for path in OPENAPI["paths"]:
        assert f"| `{path}` |" in page


def test_every_kind_of_error_stands_beside_its_exit_code():
    rows = {}
    for line in (DOCS / "exit-codes.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdecimal():
            rows[int(cells[0])] = set(re.findall(r"`(\w+)`", cells[1]))
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, SwarmError):
            assert name in rows[kind.exit_code]
