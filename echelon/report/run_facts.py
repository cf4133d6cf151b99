"""Everything that a report says of a run, read once from its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from echelon.files import read_rows
from echelon.metrics import EVALUATION, TRAINED
from echelon.report.journal_facts import JournalFacts, read_journal_facts
from echelon.report.samples import SampledText, read_samples
from echelon.run_folder import RunFolder
from echelon.settings import flatten

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """rows: of steps that were taken. evaluations: rows with an accuracy. settings: by dotted name, as the run's file
    has them, whichever version wrote it. num_prompts: of an epoch, 0 where not known. notes: what a reader should know
    of how complete this is, a line each.
    """

    name: str
    path: Path
    recipe: str
    rows: list[Row]
    evaluations: list[Row]
    settings: Mapping[str, Any]
    journal: JournalFacts | None
    samples: list[SampledText]
    num_prompts: int
    is_going: bool
    notes: tuple[str, ...]

    def setting(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)


def read_run(path: Path) -> RunFacts:
    """Raises: ValueError, in one line, where there is no run, or none that has anything to report."""
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise ValueError(f"no such run folder: {path}")
    record = folder.record()
    notes: list[str] = []
    is_going = folder.is_in_use()
    rows = _rows(folder.metrics_file, notes)
    taken = [row for row in rows if TRAINED in row]
    if not taken:
        why = "it is still being started" if is_going else "it has no row of a step in metrics.jsonl"
        raise ValueError(f"{folder.path} has nothing to report: {why}")
    if is_going:
        notes.insert(0, f"The run is still going: this is as of step {taken[-1]['step']}.")
    journal = read_journal_facts(folder.journal)
    notes += _journal_notes(journal)
    return RunFacts(
        name=folder.path.name,
        path=folder.path,
        recipe=record.recipe,
        rows=taken,
        evaluations=[row for row in rows if EVALUATION in row],
        settings=_settings(folder.config_file, notes),
        journal=journal,
        samples=_samples(folder, notes),
        num_prompts=_num_lines(folder.train_prompts),
        is_going=is_going,
        notes=tuple(notes),
    )


def _rows(file: Path, notes: list[str]) -> list[Row]:
    """Those that can be read; a step that is there twice counts as it was written last."""
    try:
        rows = read_rows(file)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        rows = _readable_rows(file, notes)
    whole = [row for row in rows if isinstance(row.get("step"), int)]
    if len(whole) < len(rows):
        notes.append(f"{file.name}: {len(rows) - len(whole)} rows without a step are left out.")
    return list({row["step"]: row for row in whole}.values())


def _readable_rows(file: Path, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            notes.append(f"{file.name}, line {number} is damaged and left out: {error}.")
    return rows


def _journal_notes(journal: JournalFacts | None) -> list[str]:
    if journal is None:
        return ["There is no journal, so there are no time lines of workers and no fates of single groups."]
    notes = [f"Damaged: {note}." for note in journal.notes]
    if journal.first_step > 0:
        notes.append(
            f"The journal begins at step {journal.first_step} (journal.keep=true keeps all of it): the time line and "
            "charts of single groups show what came after."
        )
    if not journal.has_times:
        notes.append("The journal was written by a version of Echelon that noted no times: there is no time line.")
    return notes


def _settings(file: Path, notes: list[str]) -> dict[str, Any]:
    """Not by way of `RunConfig`: a run of another version has other settings."""
    try:
        return flatten(msgspec.json.decode(file.read_bytes(), type=dict[str, Any]))
    except (OSError, msgspec.MsgspecError) as error:
        notes.append(f"{file.name} cannot be read ({error}): settings are not compared, and advice knows none.")
        return {}


def _samples(folder: RunFolder, notes: list[str]) -> list[SampledText]:
    try:
        return read_samples(folder.samples_file, folder.tokenizer / "tokenizer.json")
    except (OSError, msgspec.MsgspecError, json.JSONDecodeError, KeyError, TypeError) as error:
        notes.append(f"{folder.samples_file.name} cannot be read: {error}.")
        return []


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0
