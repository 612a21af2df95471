"""Logs: what gets in, and that no secret does."""

import ast
import io
import json
import logging
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import logs
from swarm.edges import Source

ROOT = Path(__file__).parent.parent
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
SECRET = "s3cr3t-canary"


@pytest.fixture
def lines():
    """Log as JSON into a list; logging is as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()

    def read():
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    logs.configure("debug", "json", stream)
    yield read
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def log_calls():
    """(place, keyword names) of every log call in the source."""
    for path in [*ROOT.glob("swarm/**/*.py"), *ROOT.glob("cli/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in METHODS
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("log", "_log")
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", [keyword.arg for keyword in node.keywords if keyword.arg]


def test_every_field_logged_anywhere_is_on_the_list():
    calls = list(log_calls())
    assert len(calls) > 20
    unlisted = {place: sorted(set(names) - logs.FIELDS) for place, names in calls if not set(names) <= logs.FIELDS}
    assert not unlisted, "think whether it can hold a secret, then add it to swarm.logs.FIELDS"


def test_a_field_nobody_decided_to_show_is_replaced_by_its_name(lines):
    structlog.get_logger("x").info("hello", headers={"Authorization": SECRET}, task=b"\xab")
    [line] = lines()
    assert SECRET not in json.dumps(line)
    assert (line["unlisted"], line["task"], line["event"]) == (["headers"], "ab", "hello")


@pytest.mark.parametrize(
    "text",
    [
        f"GET http://user:{SECRET}@origin.example/file",
        f"https://b.s3.example/k?X-Amz-Signature={SECRET}&X-Amz-Date=1 refused",
        f"Authorization: Bearer {SECRET}",
        f"authorization: basic {SECRET}",
        f"http://a/b?c=1#{SECRET} http://{SECRET}@h/",
    ],
)
def test_a_secret_in_a_text_is_taken_out(lines, text):
    log = structlog.get_logger("x")
    log.warning(text)
    log.info("failed", url=text, error=ValueError(text), reason=text)
    logging.getLogger("httpx").warning("request %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("boom")
    assert len(lines()) == 4
    assert SECRET not in json.dumps(lines())


def test_what_a_user_gave_for_an_origin_has_no_way_into_a_log(lines):
    source = Source(f"http://u:{SECRET}@h/f?X-Amz-Signature={SECRET}", headers=(("Authorization", f"Bearer {SECRET}"),))
    structlog.get_logger("x").error(f"bad {source}", reason=source, error=f"{source!r}")
    assert SECRET not in json.dumps(lines())


def test_libraries_log_warnings_only_because_their_details_are_whole_urls(lines):
    logging.getLogger("httpx").info("HTTP Request: GET http://h/?%s", SECRET)
    logging.getLogger("trio").debug("x")
    logging.getLogger("hypercorn").warning("heard")
    assert [line["event"] for line in lines()] == ["heard"]


def test_a_level_hides_what_is_below_it(lines):
    stream = io.StringIO()
    logs.configure("warning", "json", stream)
    structlog.get_logger("x").info("no")
    structlog.get_logger("x").warning("yes")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes"]


def test_text_is_for_people_and_has_no_colours_outside_a_terminal(lines):
    stream = io.StringIO()
    logs.configure("info", "text", stream)
    structlog.get_logger("x").info("hello", task="ab")
    assert "hello" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


USERINFO = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/?# \t\r\n\"'"), min_size=1, max_size=20)


@given(USERINFO, st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_whatever_userinfo_looks_like_it_does_not_stay(userinfo, rest):
    assert logs.redact(f"http://{userinfo}@host/x") == "http://***@host/x"
    assert f"://{userinfo}@host" not in logs.redact(f"{rest} http://{userinfo}@host/x") or userinfo == "***"
