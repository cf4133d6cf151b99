"""`echelon report`: what a run's folder says, as one HTML file, or its advice alone on the terminal."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from echelon.files import write_atomically
from echelon.report.advice import advise
from echelon.report.page import figures_of, render
from echelon.report.run_facts import RunFacts, read_run

REPORT = "report.html"


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, where a folder is no run's or has nothing to report, or --out cannot be."""
    out = _out(args)
    runs = _with_names([read_run(Path(path)) for path in args.run_dirs])
    if args.advice:
        sys.stdout.write(_advice(runs))
        return 0
    page = render(runs).encode()
    try:
        write_atomically(out, page)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}: name another file with --out") from None
    for run in runs:
        for note in run.notes:
            sys.stdout.write(f"{run.name}: {note}\n")
    sys.stdout.write(f"{out} ({len(page) / 1e6:.1f} MB)\n")
    return 0


def _out(args: argparse.Namespace) -> Path:
    if args.out is None:
        return Path(args.run_dirs[0]).expanduser() / REPORT
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    return out


def _with_names(runs: list[RunFacts]) -> list[RunFacts]:
    """Two folders of one name are told apart by their paths."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def _advice(runs: list[RunFacts]) -> str:
    lines = []
    for run in runs:
        found = [advice.text for advice in advise(figures_of(run))] or ["nothing stands out"]
        lines += [f"{run.name}: {text}" if len(runs) > 1 else text for text in found]
    return "".join(f"{line}\n" for line in lines)
