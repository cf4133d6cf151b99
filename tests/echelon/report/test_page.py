"""The page of a synthetic run in the real formats: what it says, and that it is whole without anything else."""

import importlib.util
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
from scripted_run import ScriptedRun

from databus.journal import segment_path
from echelon.cli import BAD_INPUT, OK, main
from echelon.report.journal_facts import read_journal_facts
from echelon.report.page import render
from echelon.report.run_facts import RunFacts, read_run
from echelon.report.time_line import time_line, worker_rates
from echelon.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
STEPS, WORKERS, BATCH = 310, 3, 2
VOID = {"meta", "link", "br", "input"}
SECTIONS = ["advice", "totals", "reward", "staleness", "time", "length", "drafting", "mismatch", "selection", "samples"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The benchmark's generator."""
    spec = importlib.util.spec_from_file_location("report_run", ROOT / "benchmarks/report_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_dir(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.write_run(tmp_path_factory.mktemp("runs") / "first", STEPS, WORKERS, tokens=6, batch_groups=BATCH).path


@pytest.fixture(scope="module")
def facts(run_dir: Path) -> RunFacts:
    return read_run(run_dir)


@pytest.fixture(scope="module")
def page(facts: RunFacts) -> str:
    return render([facts])


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> RunFolder:
    """For changing."""
    return RunFolder(shutil.copytree(run_dir, tmp_path / "copy"))


class Elements(HTMLParser):
    """Checks that what is opened is closed; collects attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in VOID else [tag]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.scripts += tag == "script"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    elements.close()
    assert elements.open == [] and elements.scripts == 0
    assert all(each.startswith(("#", "data:")) for each in elements.loads)
    assert "url(" not in page and "@import" not in page
    assert set(SECTIONS) <= set(elements.ids) and len(elements.ids) == len(set(elements.ids))


def test_every_chart_says_what_it_is(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 25
    for figure in figures:
        title, unit = re.findall(r'<figcaption>(.+?) <span class="unit">(.+?)</span>', figure)[0]
        svg = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", figure, re.DOTALL)[0])
        assert svg.get("role") == "img" and unit
        assert svg.findtext("title") in (title, title.replace("&#x27;", "'")) and svg.findtext("desc")
        assert "nan" not in (svg.findtext("desc") or "") and "nan" not in figure
        ticks = [each for each in svg.iter("text") if each.get("class") == "tick"]
        assert len(ticks) >= 2, title


def test_long_series_say_that_they_were_reduced(page: str) -> None:
    assert "Each point is the mean of up to 2 steps, the band their smallest to largest." in page


def test_the_time_line_tells_who_waited_for_whom(facts: RunFacts, maker: ModuleType) -> None:
    assert facts.journal is not None
    line = time_line(facts.journal, facts.rows)
    assert line is not None
    roles = {role.name: role for role in line.roles}
    assert list(roles) == ["broker", "learner", *(f"worker-{index}" for index in range(WORKERS))]
    waits = maker.WAIT_S / (maker.WAIT_S + maker.STEP_S)
    assert np.isclose(roles["learner"].idle_share, waits, atol=0.01)
    assert "waits for one 31%" in roles["learner"].said
    for role in roles.values():
        assert (sum(role.shares.values()) <= 1 + 1e-9).all() and all((part >= 0).all() for part in role.shares.values())
    assert len(worker_rates(facts.journal)) == WORKERS


def test_fates_are_those_of_the_journal(facts: RunFacts) -> None:
    assert facts.journal is not None
    fates = [outcome.fate for outcome in facts.journal.outcomes]
    assert fates.count("trained") == STEPS * BATCH and fates.count("stale") == -(-STEPS // 3)
    assert len(fates) == fates.count("trained") + fates.count("stale")


def test_samples_are_spread_and_coloured(facts: RunFacts, page: str) -> None:
    steps = sorted({sample.step for sample in facts.samples})
    assert steps[0] == 0 and steps[-1] > 0.9 * STEPS and 15 <= len(steps) <= 20
    assert all(len(sample.versions or ()) == len(sample.tokens) for sample in facts.samples)
    assert 'class="v2 l' in page and 'class="v0 l' in page and "text good s" in page


def test_what_a_model_wrote_is_text_and_not_html(copy: RunFolder) -> None:
    sample = {"step": 0, "prompt": "<script>alert(1)</script>", "token_ids": [1], "reward": 1.0, "truncated": False}
    copy.samples_file.write_bytes(msgspec.json.encode(sample) + b"\n")
    page = render([read_run(copy.path)])
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "did not record versions" in page  # an older run


def test_two_runs_lie_side_by_side(facts: RunFacts, maker: ModuleType, tmp_path: Path) -> None:
    other = maker.write_run(tmp_path / "second", 30, 2, tokens=6, batch_groups=BATCH, seed=1)
    page = render([facts, read_run(other.path)])
    assert "<h3>Settings that differ</h3>" in page and "<th>rollout.workers</th><td>3</td><td>2</td>" in page
    assert "first: mean" in page and "second: mean" in page and "Who worked when: second" in page


# ---------------------------------------------------------------- bad input


def test_the_command_writes_one_file(copy: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(copy.path)]) == OK
    assert capsys.readouterr().out.startswith(f"{copy.path / 'report.html'} (0.")
    assert main(["report", str(copy.path), "--advice"]) == OK
    assert capsys.readouterr().out.startswith("The learner waits 3")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda folder: shutil.rmtree(folder.path), "no such run folder"),
        (lambda folder: folder.record_file.unlink(), "is not a run's folder: it has no run.json"),
        (lambda folder: folder.metrics_file.unlink(), "has nothing to report: it has no row of a step"),
        (lambda folder: folder.metrics_file.write_text('{"step": 0}\n'), "has nothing to report"),
        (lambda folder: (folder.path / "report.html").mkdir(), "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    change, line: str, copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copy)
    assert main(["report", str(copy.path)]) == BAD_INPUT
    assert line in (said := capsys.readouterr().err) and said.count("\n") == 1


def _cut_a_row(folder: RunFolder) -> None:
    lines = folder.metrics_file.read_bytes().splitlines(keepends=True)
    folder.metrics_file.write_bytes(b"".join([*lines[:9], lines[9][:40] + b"\n", *lines[10:]]))


def _flip_a_byte(folder: RunFolder) -> None:
    path = segment_path(folder.journal, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _another_version(folder: RunFolder) -> None:
    config = msgspec.json.decode(folder.config_file.read_bytes()) | {"a_setting_of_long_ago": 3}
    folder.config_file.write_bytes(msgspec.json.encode(config))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_cut_a_row, "metrics.jsonl, line 10 is damaged and left out"),
        (_flip_a_byte, "the journal cannot be read to its end: "),
        (lambda folder: folder.config_file.unlink(), "config.json cannot be read"),
        (lambda folder: shutil.rmtree(folder.journal), "There is no journal"),
        (lambda folder: folder.samples_file.write_text("[]\n"), "samples.jsonl cannot be read"),
        (_another_version, ""),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_shown(change, note: str, copy: RunFolder) -> None:
    change(copy)
    facts = read_run(copy.path)
    assert len(facts.notes) == bool(note) and note in "".join(facts.notes)
    page = render([facts])
    assert all(f'<section id="{name}">' in page for name in SECTIONS) and "Reward" in page


def test_a_run_that_is_still_written_is_reported_as_such(copy: RunFolder) -> None:
    with copy.metrics_file.open("ab") as file, copy.locked():
        file.write(b'{"step": 310, "loss/po')
        file.flush()
        facts = read_run(copy.path)
    assert facts.notes == (f"The run is still going: this is as of step {STEPS - 1}.",)
    assert len(facts.rows) == STEPS


def test_a_journal_of_an_older_version_has_no_times(tmp_path: Path) -> None:
    run = ScriptedRun()
    run.steps(3)
    folder = run.write(tmp_path / "old")
    journal = read_journal_facts(folder.journal)
    assert journal is not None and not journal.has_times and time_line(journal, []) is None
    assert "noted no times" in "".join(read_run(folder.path).notes)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_has_nothing_to_complain_of(page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Sampled completions" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
