"""`echelon audit`: proves a run from its journal, checkpoints and rows; names the first violation."""

import argparse
import sys

import msgspec

from echelon.audit.run import AuditReport, audit_run
from echelon.run_folder import RunFolder


class AuditFailed(RuntimeError):
    """The run broke a promise; the text is the first one."""


def execute(args: argparse.Namespace) -> int:
    """Raises: AuditFailed; ValueError where RUN_DIR has no journal."""
    report = audit_run(RunFolder(args.run_dir))
    if args.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if report.violations:
        others = len(report.violations) - 1
        more = f" (and {others} more: --json)" if others and not args.json else ""
        raise AuditFailed(report.violations[0].line() + more)
    if not args.json:
        sys.stdout.write(summary(report))
    return 0


def summary(report: AuditReport) -> str:
    groups = ", ".join(f"{count} {state}" for state, count in report.groups.items())
    steps = "no step" if report.first_step is None else f"steps {report.first_step} to {report.last_step}"
    read = f"{report.num_records:,} records, {report.journal_bytes:,} bytes in {report.num_segments} segments"
    return (
        f"{report.run_id} keeps its promises: {steps}\n"
        f"groups      {groups}\n"
        f"tokens      {report.tokens:,} trained, {report.loss_tokens:,} of them with loss\n"
        f"lag         at most {report.max_lag} versions, allowed are {report.max_staleness}\n"
        f"read        {read}; {report.num_rows} rows; {report.num_checkpoints} checkpoints\n"
    )
