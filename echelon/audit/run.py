"""The audit of a run's folder: its journal, then its rows and checkpoints against it."""

from pathlib import Path

import msgspec
from msgspec import Struct

from databus.journal import JournalDamaged, read_journal, segment_path, segments
from databus.records import BrokerStarted
from echelon.audit.checkpoints import check_checkpoints
from echelon.audit.history import History
from echelon.audit.ledger import SETTLED
from echelon.audit.rows import check_rows
from echelon.audit.violation import Findings, Violation
from echelon.config import RunConfig
from echelon.files import read_rows
from echelon.run_folder import RunFolder


class AuditReport(Struct, frozen=True, kw_only=True):
    """What was looked at and what was found. `violations` is empty where the run keeps its promises.

    first_step, last_step: of the steps that the journal has; None where it has none. groups: leased ones by state.
    tokens, loss_tokens: of completions, and of those the ones that bore loss. max_lag: in versions.
    """

    run_id: str
    violations: tuple[Violation, ...]
    first_step: int | None
    last_step: int | None
    groups: dict[str, int]
    tokens: int
    loss_tokens: int
    max_lag: int
    max_staleness: int
    num_records: int
    num_segments: int
    journal_bytes: int
    num_rows: int
    num_checkpoints: int


def audit_run(folder: RunFolder) -> AuditReport:
    """Raises: ValueError, in one line, where there is no run with a journal, or it is still going."""
    run_id, config = folder.record().run_id, folder.config()
    if folder.is_in_use():
        raise ValueError(f"{folder.path} is in use: audit the run once it has ended")
    numbers = segments(folder.journal)
    if not numbers:
        raise ValueError(f"{folder.path} has no journal to audit")
    findings = Findings()
    history = History(findings, terms_of(config, run_id))
    try:
        for entry in read_journal(folder.journal):
            history.take(entry)
    except JournalDamaged as error:
        findings.place = None
        findings.add("damage", str(error))
    history.finish()
    rows = _rows(folder.metrics_file, findings)
    is_complete = history.ended is not None and history.ended.ok
    check_rows(rows, history.batches.taken, history.first_step, findings, is_complete)
    num_checkpoints = check_checkpoints(folder.checkpoints, history.saved.by_segment, history.num_steps(), findings)
    return _report(history, folder.journal, numbers, len(rows), num_checkpoints)


def terms_of(config: RunConfig, run_id: str) -> BrokerStarted:
    return BrokerStarted(
        run_id=run_id,
        steps=config.learner.steps,
        group_size=config.group_size,
        batch_groups=config.batch_groups,
        max_staleness=config.max_staleness,
        stale_policy=config.stale_policy,
        max_tokens=config.rollout.max_tokens,
    )


def _rows(file: Path, findings: Findings) -> list[dict]:
    try:
        return read_rows(file)
    except msgspec.MsgspecError as error:
        findings.add("damage", f"{file}: not lines of JSON objects: {error}")
        return []


def _report(history: History, journal: Path, numbers: list[int], num_rows: int, num_checkpoints: int) -> AuditReport:
    trained = [step.facts for step in history.batches.taken.values() if step.facts is not None]
    counts = history.ledger.settled_counts()
    open_groups = {state: history.ledger.count_open(state) for state in ("completed", "leased", "expired")}
    return AuditReport(
        run_id=history.terms.run_id,
        violations=tuple(history.findings.violations),
        first_step=min(history.batches.taken, default=None),
        last_step=max(history.batches.taken, default=None),
        groups={state: counts[state] for state in SETTLED} | open_groups,
        tokens=sum(facts.tokens for facts in trained),
        loss_tokens=sum(facts.loss_tokens for facts in trained),
        max_lag=max((facts.max_lag for facts in trained), default=0),
        max_staleness=history.terms.max_staleness,
        num_records=history.num_records,
        num_segments=len(numbers),
        journal_bytes=sum(segment_path(journal, number).stat().st_size for number in numbers),
        num_rows=num_rows,
        num_checkpoints=num_checkpoints,
    )
