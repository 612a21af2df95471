"""Sources whose credentials change over time, and questions that are answered as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio

from swarm.edges import Source
from swarm.errors import NotPermitted, OriginError, OriginRefused, OriginUnreachable
from swarm.origin.origin import OriginReader
from tests.origin.web import CONTENT, Asked, Reply, Web, content_reply, take


@dataclass(eq=False)
class Tokens:
    """Gives a new token after each refusal."""

    most: int = 9
    number: int = 0
    asked: int = 0
    challenged: list[tuple[str, ...]] = field(default_factory=list)

    async def headers(self) -> tuple[tuple[str, str], ...]:
        self.asked += 1
        return (("Authorization", f"Bearer token-{self.number}"),) if self.number else ()

    def refused(self, headers: tuple[tuple[str, str], ...], challenges: tuple[str, ...]) -> bool:
        self.challenged.append(challenges)
        self.number += 1
        return self.number <= self.most


def source(tokens: Tokens, path: str = "/blob") -> Source:
    return Source(f"http://registry.example{path}", requester="mirror", authorization=tokens)


def guarded(accepted: list[str]) -> Web:
    web = Web()

    def serve(asked: Asked) -> Reply:
        if asked.headers.get("authorization") in accepted:
            return content_reply(asked)
        return Reply(401, {"www-authenticate": 'Bearer realm="http://auth.example/token"'})

    web.serve("registry.example", serve)
    return web


def sent(web: Web, host: str = "registry.example") -> list[str]:
    return [asked.headers.get("authorization", "") for asked in web.asked if asked.host == host]


def test_a_challenge_is_met_once_and_later_ranges_carry_the_token_at_once() -> None:
    web, tokens = guarded(["Bearer token-1"]), Tokens()

    async def main(reader: OriginReader) -> None:
        assert (await reader.head(source(tokens))).length == len(CONTENT)
        assert await take(reader, source(tokens), 5, 10) == CONTENT[5:10]
        assert await take(reader, source(tokens), 10, 20) == CONTENT[10:20]

    web(main)
    assert sent(web) == ["", "Bearer token-1", "Bearer token-1", "Bearer token-1"]
    assert tokens.challenged == [('Bearer realm="http://auth.example/token"',)]


def test_a_token_that_ran_out_between_two_ranges_is_replaced() -> None:
    accepted = ["Bearer token-1"]
    web, tokens = guarded(accepted), Tokens()

    async def main(reader: OriginReader) -> None:
        await take(reader, source(tokens), 5, 10)
        accepted[:] = ["Bearer token-2"]
        assert await take(reader, source(tokens), 10, 20) == CONTENT[10:20]

    web(main)
    assert sent(web)[-2:] == ["Bearer token-1", "Bearer token-2"]


def test_a_registry_that_refuses_everything_is_not_asked_for_ever() -> None:
    web, tokens = guarded([]), Tokens()

    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginRefused):
            await reader.head(source(tokens))

    web(main)
    assert len(web.asked) == 3


def test_who_has_nothing_better_is_told_of_the_refusal_at_once() -> None:
    web, tokens = guarded([]), Tokens(most=0)

    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginRefused):
            await reader.head(source(tokens))

    web(main)
    assert len(web.asked) == 1


def test_the_token_stays_behind_when_the_registry_redirects_to_a_storage_host() -> None:
    web, tokens = Web(), Tokens(number=7)
    web.serve("registry.example", lambda asked: Reply(307, {"location": "http://storage.example/signed?X-Amz-Signature=s"}))
    web.serve("storage.example", content_reply)

    async def main(reader: OriginReader) -> None:
        assert await take(reader, source(tokens), 5, 10) == CONTENT[5:10]
        assert await take(reader, source(tokens), 10, 20) == CONTENT[10:20]

    web(main)
    assert sent(web) == ["Bearer token-7"]
    assert sent(web, "storage.example") == ["", ""]


@pytest.mark.parametrize(("host", "port"), [("evil.example", 80), ("registry.example", 8080)])
def test_a_storage_host_that_asks_for_credentials_gets_none_and_no_say(host: str, port: int) -> None:
    """Another port is another host."""
    web, tokens = Web(), Tokens(number=7)
    web.serve("registry.example", lambda asked: Reply(307, {"location": f"http://{host}:{port}/"}))
    web.serve(host, lambda asked: Reply(401, {"www-authenticate": 'Basic realm="give me the password"'}), port=port)

    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginRefused):
            await take(reader, source(tokens), 5, 10)

    web(main)
    assert tokens.challenged == []
    assert sent(web, host)[-1] == ""


def test_a_redirect_within_the_registry_is_walked_again_with_a_fresh_token() -> None:
    accepted = ["Bearer token-1"]
    web, tokens = Web(), Tokens()

    def serve(asked: Asked) -> Reply:
        if asked.headers.get("authorization") not in accepted:
            return Reply(401, {"www-authenticate": "Bearer"})
        return content_reply(asked) if asked.target == "/real" else Reply(307, {"location": "/real"})

    web.serve("registry.example", serve)

    async def main(reader: OriginReader) -> None:
        await take(reader, source(tokens), 5, 10)
        accepted[:] = ["Bearer token-2"]
        assert await take(reader, source(tokens), 10, 20) == CONTENT[10:20]

    web(main)


def test_each_retry_takes_what_is_valid_then() -> None:
    web, tokens, failures = Web(), Tokens(number=1), iter([503, 503])

    def serve(asked: Asked) -> Reply:
        return Reply(next(failures, 200))

    web.serve("registry.example", serve)

    async def main(reader: OriginReader) -> None:
        await reader.ask(source(tokens), accept=frozenset({200}))

    web(main)
    assert tokens.asked == 3


def test_several_challenges_are_all_told() -> None:
    web, tokens = Web(), Tokens(most=0)

    async def serve(asked: Asked) -> None:
        await asked.stream.send_all(
            b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=a\r\n"
            b"www-authenticate: Bearer realm=b\r\ncontent-length: 0\r\n\r\n"
        )

    web.serve("registry.example", serve)

    async def main(reader: OriginReader) -> None:
        answer = await reader.ask(source(tokens), accept=frozenset({401}))
        assert answer.challenges == ("Basic realm=a", "Bearer realm=b")

    web(main)
    assert tokens.challenged == [("Basic realm=a", "Bearer realm=b")]


# --- questions ---


def question(reply: Reply) -> Web:
    web = Web()
    web.serve("registry.example", lambda asked: reply)
    return web


PLAIN = Source("http://registry.example/v2/", requester="mirror")


def test_an_answer_comes_as_a_whole() -> None:
    async def main(reader: OriginReader) -> None:
        answer = await reader.ask(PLAIN, accept=frozenset({200}), max_bytes=5)
        assert (answer.status, answer.body, answer.headers["x"]) == (200, b"hello", "y")

    question(Reply(200, {"x": "y"}, b"hello"))(main)


@pytest.mark.parametrize("framed", [True, False])
def test_an_answer_without_end_is_cut_off(framed: bool) -> None:
    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginError, match="more than 1000 bytes"):
            await reader.ask(PLAIN, accept=frozenset({200}), max_bytes=1000)

    question(Reply(200, {}, b"x" * 500_000, framed))(main)


def test_an_answer_shorter_than_it_says_is_not_taken_for_whole() -> None:
    web = Web()

    async def serve(asked: Asked) -> None:
        await asked.stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")

    web.serve("registry.example", serve)

    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginUnreachable):
            await reader.ask(PLAIN, accept=frozenset({200}), max_bytes=1000)

    web(main)
    assert len(web.asked) == 2


def test_what_an_error_says_is_not_read() -> None:
    async def main(reader: OriginReader) -> None:
        answer = await reader.ask(PLAIN, accept=frozenset({404}), max_bytes=1000)
        assert answer.body == b""

    question(Reply(404, {}, b"a page"))(main)


def test_an_answer_that_is_not_expected_is_a_failure() -> None:
    async def main(reader: OriginReader) -> None:
        with pytest.raises(OriginRefused):
            await reader.ask(PLAIN, accept=frozenset({200}))

    question(Reply(403))(main)


def test_a_form_is_sent_once_and_follows_no_redirect() -> None:
    web, bodies = Web(), []

    async def serve(asked: Asked) -> Reply:
        with trio.fail_after(5):
            bodies.append(await asked.stream.receive_some())
        assert asked.headers["content-type"] == "application/x-www-form-urlencoded"
        return Reply(307, {"location": "http://evil.example/"})

    web.serve("registry.example", serve)

    async def main(reader: OriginReader) -> None:
        answer = await reader.ask(PLAIN, "POST", accept=frozenset({307}), form=b"refresh_token=secret")
        assert answer.status == 307

    web(main)
    assert bodies == [b"refresh_token=secret"]
    assert [asked.method for asked in web.asked] == ["POST"]


def test_a_redirect_that_is_an_answer_is_not_followed() -> None:
    web = question(Reply(302, {"location": "http://storage.example/x", "x-said": "this"}))

    async def main(reader: OriginReader) -> None:
        answer = await reader.ask(PLAIN, "HEAD", accept=frozenset({302}))
        assert (answer.status, answer.headers["x-said"], answer.redirected) == (302, "this", False)
        with pytest.raises(OriginError):  # elsewhere it is followed, to where nobody is
            await reader.ask(PLAIN, "HEAD", accept=frozenset({200}))

    web(main)
    assert {asked.host for asked in web.asked} == {"registry.example"}


def test_a_file_is_no_source_of_answers() -> None:
    async def main(reader: OriginReader) -> None:
        with pytest.raises(NotPermitted):
            await reader.ask(Source("file:///etc/passwd"), accept=frozenset({200}))

    Web()(main)
