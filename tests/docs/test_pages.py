"""The documents hold together, and say what the code says."""

from __future__ import annotations

import ast
import configparser
import inspect
import re
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import click
import msgspec
import pytest

from cli.main import root
from simulations import compare
from simulations.world import Shape
from swarm import config, metrics, wire
from swarm.dht import messages, records, rpc
from swarm.download.exchange import Why
from swarm.download.policy import Policy
from swarm.node import Node
from swarm.peer.limits import ProgressRule
from tests.docs import generated
from tests.docs.pages import PAGES, ROOT, anchors, links, prose, steps

DOCS = ROOT / "docs"
SOURCES = sorted(path for top in ("swarm", "cli", "scheduler", "simulations", "tests") for path in (ROOT / top).rglob("*.py"))


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_inside_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(found.read_text()), target


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links(page.read_text()) if ":" not in link]
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", generated.PARTS)
def test_what_is_written_from_the_code_is_what_the_code_says(page: str) -> None:
    text = (DOCS / page).read_text()
    assert text == generated.filled(page, text), "run: python -m tests.docs.generated"


def test_every_message_and_every_signed_body_is_in_the_wire_reference() -> None:
    listed = {*generated.CONTROL, *generated.SIGNED, *generated.CHANNEL, *generated.DATAGRAMS, *generated.DATAGRAM_BODIES}
    for module in (wire, messages, records):
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__:
                assert kind in listed or name.startswith("_"), f"{name} is in no table of docs/reference/wire.md"


def test_every_bound_in_the_wire_reference_says_why() -> None:
    for line in generated.bound_table().splitlines():
        assert not line.endswith("|  |"), f"say why, beside it or in tests.docs.generated.TEXTS: {line}"


def test_every_metric_is_explained_with_every_value_of_its_labels() -> None:
    page = (DOCS / "reference/metrics.md").read_text()
    told = {word for code in re.findall(r"`([^`]+)`", page) for word in [code]}
    for metric in metrics.METRICS:
        assert metric.name in told, metric.name
    values = {str(why) for why in Why} | {"ok", "peers", "origin", "local", "complete", "partial"}
    values |= {f"dropped_{reason}" for reason in re.findall(r'_dropped\["([^"]+)"\]', inspect.getsource(rpc))}
    values |= {f"query_{kind.__name__}" for kind in messages.Query.__args__}
    samples = inspect.getsource(Node.samples) + inspect.getsource(Node._peer_samples)
    for listed in re.findall(r"for event in (\([^)]*\))", samples):
        values |= set(ast.literal_eval(listed))
    values |= set(re.findall(r'\("(\w+)", kept\.\w+\)', samples))
    assert len(values) > 30
    assert values <= told, sorted(values - told)


def test_no_metric_is_explained_that_does_not_exist() -> None:
    declared = {metric.name for metric in metrics.METRICS}
    for page in PAGES:
        for name in re.findall(r"\bswarm_[a-z_]+\b", page.read_text()):
            assert name in declared or re.sub("_(bucket|sum|count)$", "", name) in declared, f"{names(page)}: {name}"


def test_every_word_is_in_alphabetical_order_in_the_glossary() -> None:
    words = re.findall(r"^\| ([^|]+) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)[2:]
    assert len(words) > 30
    assert words == sorted(words)


def test_every_test_that_a_page_names_exists() -> None:
    existing = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in SOURCES)))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert name in existing, f"{names(page)} names {name}"


def test_every_number_of_a_threat_or_fault_in_the_source_is_in_the_design() -> None:
    known = {"T": (DOCS / "design/threat-model.md").read_text(), "R": (DOCS / "design/failure-modes.md").read_text()}
    for path in SOURCES:
        for kind, number in re.findall(r"(?:SECURITY: |\()([TR])(\d{1,2})\b", path.read_text()):
            assert f"| {kind}{number} |" in known[kind], f"{path}: {kind}{number}"


def test_every_command_in_a_page_is_one_that_can_be_typed() -> None:
    seen = 0
    for page in PAGES:
        for line in re.findall(r"^[$#] (swarm .*)$", page.read_text(), re.MULTILINE):
            _check_command(line, names(page))
            seen += 1
    assert seen > 20


def _check_command(line: str, where: str) -> None:
    command: click.Command = root
    context = click.Context(root)
    for word in shlex.split(re.split(r" [|&>]|;|   #", line)[0], comments=True)[1:]:
        if word.startswith("-"):
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
            assert word.partition("=")[0] in known, f"{where}: {line}"
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            assert found is not None, f"{where}: {line}"
            command = found


def test_every_path_in_a_page_exists() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:swarm|cli|simulations|tests|docs|requirements)/[\w./-]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{names(page)} names {path}"


def test_every_module_that_a_page_runs_exists() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m ((?:swarm|cli|simulations|tests)[\w.]*)", page.read_text()):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{names(page)} runs {module}"


def test_every_setting_in_a_page_exists() -> None:
    known = {name for name, *_ in config.declared()}
    sections = {name.partition(".")[0] for name in known if "." in name}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)(?: = [^`]*)?`", page.read_text()):
            assert name in known or name.partition(".")[0] not in sections or name.endswith((".py", ".key", ".crt")), name


def test_the_example_configuration_is_accepted(tmp_path: Path) -> None:
    example = DOCS / "how-to/swarm.toml"
    settings = config.load(file=example, environment={})
    assert tomllib.loads(example.read_text())["network"]["directory"] == str(settings.network.directory)
    assert settings.store.quota == 200 * 1024**3


def test_the_example_unit_starts_a_command_that_exists() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # keys of systemd have capitals
    unit.read(DOCS / "how-to/swarm.service")
    _check_command(
        Path(unit["Service"]["ExecStart"].split()[0]).name + unit["Service"]["ExecStart"].partition("swarm")[2], "unit"
    )
    assert unit["Service"]["Type"] == "notify"
    assert float(unit["Service"]["TimeoutStopSec"]) > config.Settings().drain


def test_every_decision_says_what_was_rejected() -> None:
    for page in (DOCS / "decisions").glob("[0-9]*.md"):
        text = page.read_text()
        assert re.match(r"# \d{4} ", text)
        for part in ("**Context.**", "**Decision.**", "**Rejected.**"):
            assert part in text, f"{page.name} lacks {part}"


def test_numbers_of_decisions_are_used_once() -> None:
    numbers = [page.name[:4] for page in (DOCS / "decisions").glob("[0-9]*.md")]
    assert len(numbers) == len(set(numbers))


def test_every_dependency_has_a_reason_and_the_floor_that_is_declared() -> None:
    page = (DOCS / "design/dependencies.md").read_text()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    told = dict(re.findall(r"^\| ([a-z0-9-]+) \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE))
    assert set(told) - {"package"} == {re.split("[>=]", line)[0] for line in declared}
    for line in declared:
        name, _, floor = line.partition("=")
        name = name.rstrip(">=")
        number = re.match(r"\d+(\.\d+)?", floor.lstrip("="))
        assert number is not None
        assert number[0] in told[name], f"{name}: {floor} in pyproject.toml, {told[name]!r} in the page"


def imported(path: Path) -> set[str]:
    """Top names of what a file imports, at its head or inside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_every_package_that_is_imported_is_declared_itself_and_no_other() -> None:
    """What another dependency happens to bring may be gone with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split("[>=]", line)[0] for line in project["dependencies"]}
    ours = {path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"}
    used = set[str]().union(*map(imported, ours)) - sys.stdlib_module_names - {"swarm", "cli", "scheduler", "simulations"}
    packages = metadata.packages_distributions()
    assert {packages[name][0].lower().replace("_", "-") for name in used} == declared - {
        "sniffio"
    }  # which httpcore imports if it is there


def test_no_line_of_a_page_is_too_long_to_read_in_an_editor() -> None:
    for page in PAGES:
        for line in prose(page.read_text()).splitlines():
            assert line.startswith("|") or len(line) <= 160, f"{names(page)}: {line[:60]}..."


def test_sessions_name_no_place_of_one_machine() -> None:
    for page in PAGES:
        for step in steps(page.read_text()):
            assert "/root" not in step.command
            assert "/work" not in step.command


def test_a_change_of_one_number_is_simulated_beside_the_swarm_as_it_is() -> None:
    shape = Shape(nodes=4, length=2 * 1024 * 1024, origin_rate=25e6, node_rate=6e6)
    same, changed = (compare.compare(shape, change, 1) for change in ("", "have_batch=0.0,swarm.peer.upload:SPARE_RANK=0"))
    assert same.unfinished == changed.unfinished == 0
    assert same.copies >= 1
    assert same == compare.compare(shape, "", 1)
    assert Policy().have_batch > 0
    with pytest.raises(ValueError, match="no such number"):
        compare.compare(shape, "have_bach=0", 1)


def test_a_comparison_in_which_nodes_die_comes_to_an_end() -> None:
    row = compare.compare(Shape(nodes=10, length=8 * 1024 * 1024, origin_rate=25e6, node_rate=6.25e6), "", 1, kill=0.3)
    assert row.unfinished == 0
    assert row.copies >= 1


def test_rates_at_which_a_peer_floods_are_in_the_wire_reference() -> None:
    page = (DOCS / "reference/wire.md").read_text()
    found = [
        rates
        for path in (ROOT / "swarm/peer").glob("*.py")
        for rates in re.findall(r'Flood\("[^"]+", ([\d_]+), ([\d_]+),', path.read_text())
    ]
    assert len(found) >= 3
    for sustained, at_once in found:
        assert re.search(rf"\b{int(sustained):,} [a-z ]+a\s+second\s+\({int(at_once):,} at once\)", page), (sustained, at_once)


def test_when_a_transfer_fails_is_in_the_wire_reference() -> None:
    rule = ProgressRule()
    page = " ".join((DOCS / "reference/wire.md").read_text().split())
    slow = f"below {rule.floor // 1024:g} KiB/s over {rule.window:g} s"
    assert f"A transfer fails after {rule.silence:g} s without a byte, or {slow}" in page
