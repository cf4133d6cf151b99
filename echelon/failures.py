"""Which of several failures came first, said in one line."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from echelon.cli import BAD_INPUT, FAILED
from echelon.errors import ErrorReport, read_error
from echelon.launch.base import RunningRole

ERROR_SUFFIX = ".error.json"


class RunFailed(RuntimeError):
    """The run is over; the text is the first cause, in one line."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def read_errors(logs: Path) -> list[ErrorReport]:
    """What the roles have reported, earliest first."""
    reports = [report for file in logs.glob(f"*{ERROR_SUFFIX}") if (report := read_error(file)) is not None]
    return sorted(reports, key=lambda report: report.time)


def first_cause(children: Iterable[RunningRole], logs: Path) -> RunFailed:
    """The earliest failure that is not another's consequence; a process that left no report counts by its end."""
    reports = read_errors(logs)
    ended = list(children)
    reported = {report.role for report in reports}
    silent = [child for child in ended if child.exit_code() and not _has_reported(child.name, reported)]
    candidates = [*reports, *(_report_of(child) for child in silent)]
    if not candidates:
        return RunFailed(f"{', '.join(child.name for child in ended)} ended before the run did (logs: {logs})")
    first = min(candidates, key=lambda report: (report.kind == "consequence", report.time))
    return _as_failure(first, logs)


def _has_reported(name: str, roles: set[str]) -> bool:
    return any(role == name or role.startswith(f"{name}-rank") for role in roles)


def _report_of(child: RunningRole) -> ErrorReport:
    return ErrorReport(
        time=child.exited_at or time.time(), role=child.name, kind="runtime", message=child.how_it_ended()
    )


def _as_failure(report: ErrorReport, logs: Path) -> RunFailed:
    if report.kind == "user":
        return RunFailed(report.message, BAD_INPUT)
    role = report.role.partition("-rank")[0]
    ended = report.message.startswith(("was killed", "ended with"))
    return RunFailed(f"{role}{' ' if ended else ': '}{report.message} (log: {logs / role}.log)")


def names(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
