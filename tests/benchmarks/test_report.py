"""A benchmark must not pass by mistake."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.report import Limit, Result, Run, read, row, table, write


def result(*runs: dict[str, float], failure: str = "", floor: float | None = 10.0) -> Result:
    limits = (Limit("copies", 1.05), Limit("rate", 0.6, at_least=True))
    return Result("case", "title", limits, floor, tuple(map(Run, runs)), failure)


GOOD = {"copies": 1.05, "rate": 0.6, "seconds": 12.0}


def test_a_result_within_its_limits_passes() -> None:
    assert result(GOOD).passed
    assert row(result(GOOD))[-1] == "pass"


def test_one_figure_beyond_its_limit_fails() -> None:
    assert not result({**GOOD, "copies": 1.051}).passed
    assert not result({**GOOD, "rate": 0.59}).passed
    assert row(result({**GOOD, "rate": 0.59}))[-1] == "FAIL"


def test_a_figure_that_was_not_measured_fails_its_limit() -> None:
    assert not result({"copies": 1.0}).passed
    assert not result(GOOD, {"copies": 1.0}).passed, "one of two runs lacks it"


def test_a_case_that_failed_in_one_run_fails() -> None:
    assert not result(GOOD, failure="host 3 has another file").passed
    assert not result().passed


def test_several_runs_count_by_their_median() -> None:
    runs = [{**GOOD, "copies": copies} for copies in (1.0, 1.01, 3.0)]
    assert result(*runs).figures["copies"] == 1.01
    assert result(*runs).passed


def test_the_table_shows_the_ratio_to_the_floor() -> None:
    assert "| case | 1.050 | 12.00 | 10.00 | 1.20 |" in table([result(GOOD)])


def test_raw_results_keep_every_run(tmp_path: Path) -> None:
    path = write([result(GOOD, {**GOOD, "seconds": 13.0})], tmp_path / "results", {"cores": 2})
    raw = json.loads(path.read_text())
    assert [run["figures"]["seconds"] for run in raw["results"][0]["runs"]] == [12.0, 13.0]
    assert raw["results"][0]["passed"] is True
    assert raw["machine"]["cores"] == 2
    assert table(read(path)) == table([result(GOOD, {**GOOD, "seconds": 13.0})])
