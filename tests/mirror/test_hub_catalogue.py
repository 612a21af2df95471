"""What is remembered of a hub: bounded, over a restart, and never what a token opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.mirror import hub_catalogue
from swarm.mirror.hub import ApiAnswer, FileInfo
from swarm.mirror.hub_catalogue import HubCatalogue
from swarm.mirror.paths import Name
from swarm.task import Digest

NAME = Name("hub.example", "team/model")
COMMIT = "a" * 40
INFO = FileInfo(COMMIT, "b" * 64, 7)
ANSWER = ApiAnswer(b'[{"path": "a"}]', "application/json", "/api/next?x=1", COMMIT)


def filled(path: Path | None = None) -> HubCatalogue:
    catalogue = HubCatalogue("hub.example", path)
    catalogue.note_file(NAME, "open", INFO, public=True)
    catalogue.note_file(NAME, "closed", INFO, public=False)
    catalogue.note_revision(NAME, "main", COMMIT, 5.0, public=True)
    catalogue.note_revision(NAME, "secret-branch", COMMIT, 5.0, public=False)
    catalogue.note_answer(NAME, "q", ANSWER, 6.0)
    catalogue.note_content(NAME, "c" * 40, Digest("sha256", "d" * 64))
    return catalogue


def test_what_anybody_may_know_comes_back_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path / "s").save()
    found = HubCatalogue("hub.example", tmp_path / "s")
    known = found.file(NAME, COMMIT, "open")
    assert known is not None
    assert (known.info, known.public) == (INFO, True)
    assert found.file(NAME, COMMIT, "closed") is None
    assert b"secret-branch" not in (tmp_path / "s").read_bytes()
    revision, answer = found.revision(NAME, "main"), found.answer(NAME, "q")
    assert revision is not None
    assert answer is not None
    assert (revision.commit, revision.asked) == (COMMIT, 5.0)
    assert answer.unpack() == ANSWER
    assert found.content(NAME, "c" * 40) == Digest("sha256", "d" * 64)
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_what_another_hub_said_is_not_believed_of_this_one(tmp_path: Path) -> None:
    filled(tmp_path / "s").save()
    found = HubCatalogue("other.example", tmp_path / "s")
    assert found.file(NAME, COMMIT, "open") is None
    assert found.file(Name("other.example", NAME.repository), COMMIT, "open") is None


@pytest.mark.parametrize("cut", [0, 1, 30, 200])
def test_a_file_that_cannot_be_read_is_forgotten(tmp_path: Path, cut: int) -> None:
    filled(tmp_path / "s").save()
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:cut] + b"\xff")
    found = HubCatalogue("hub.example", tmp_path / "s")
    assert found.file(NAME, COMMIT, "open") is None
    found.note_file(NAME, "open", INFO, public=True)
    found.save()
    assert HubCatalogue("hub.example", tmp_path / "s").file(NAME, COMMIT, "open") is not None


def test_a_repository_that_was_closed_is_public_no_more(tmp_path: Path) -> None:
    catalogue = filled(tmp_path / "s")
    catalogue.close(NAME)
    known = catalogue.file(NAME, COMMIT, "open")
    assert known is not None
    assert not known.public
    assert catalogue.answer(NAME, "q") is None
    catalogue.save()
    assert HubCatalogue("hub.example", tmp_path / "s").file(NAME, COMMIT, "open") is None


def test_a_file_once_seen_with_a_token_stays_public_where_it_was_seen_without() -> None:
    catalogue = filled()
    catalogue.note_file(NAME, "open", INFO, public=False)
    known = catalogue.file(NAME, COMMIT, "open")
    assert known is not None
    assert known.public


def test_nothing_grows_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_FILES", "MAX_REVISIONS", "MAX_CONTENTS", "MAX_ANSWERS"):
        monkeypatch.setattr(hub_catalogue, limit, 5)
    catalogue = HubCatalogue("hub.example")
    for number in range(20):
        catalogue.note_file(NAME, str(number), INFO, public=True)
        catalogue.note_revision(NAME, str(number), COMMIT, 0.0, public=True)
        catalogue.note_content(NAME, str(number), Digest("sha256", "d" * 64))
        catalogue.note_answer(NAME, str(number), ANSWER, 0.0)
    assert len(catalogue._files) == len(catalogue._revisions) == len(catalogue._contents) == len(catalogue._answers) == 5
    assert catalogue._answer_bytes == sum(len(it.packed) for it in catalogue._answers.values())
    monkeypatch.setattr(hub_catalogue, "MAX_ANSWER_BYTES", 3)
    catalogue.note_answer(NAME, "19", ANSWER, 0.0)
    assert catalogue.answer(NAME, "19") is None
