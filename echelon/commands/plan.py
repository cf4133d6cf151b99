"""`echelon plan`: what a recipe's throughput, waits and staleness would be, for other numbers of workers and bounds."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Console

from echelon.config import RunConfig
from echelon.plan.grid import Cell, cells, recommend
from echelon.plan.request import Basis, make_basis, parse_assumed, split_words
from echelon.plan.table import assumptions, plan_table
from echelon.recipe import load_recipe
from echelon.view import MAX_LINE


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, for a setting, a number or a run that cannot be used."""
    plain, overrides, assumed = split_words(args.overrides)
    run_dir = _run_dir(plain, args.from_run)
    recipe = load_recipe(args.recipe, overrides)
    basis = make_basis(recipe.config, run_dir, parse_assumed(assumed))
    with _quiet_broker():
        tried = list(_tried(recipe.config, basis, args))
    chosen, why = recommend(tried, recipe.config.batch_groups)
    if args.json:
        sys.stdout.write(json.dumps(_as_json(recipe.name, run_dir, basis, tried, chosen, why), indent=1) + "\n")
    else:
        _print(recipe.name, run_dir, basis, tried, chosen, why)
    return 0 if chosen is not None else 1


@contextmanager
def _quiet_broker() -> Iterator[None]:
    """What a broker warns of is of no interest where there is none."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _run_dir(plain: list[str], named: str | None) -> str | None:
    given = plain if named is None else [*plain, named]
    if len(given) > 1:
        raise ValueError(
            f"{given[0]!r} and {given[1]!r}: a plan is fitted to one run, and settings are section.key=value"
        )
    return given[0] if given else None


def _tried(config: RunConfig, basis: Basis, args: argparse.Namespace) -> Any:
    own = config.rollout.workers
    return cells(
        config,
        basis.costs,
        basis.workload,
        workers=args.workers or sorted({1, 2, 4, own}),
        staleness=sorted({0, 1, 2, 4, config.max_staleness}) if args.staleness is None else args.staleness,
        batches=args.batch or [config.batch_groups],
        steps=args.steps,
    )


def _print(name: str, run_dir: str | None, basis: Basis, tried: list[Cell], chosen: Cell | None, why: str) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(MAX_LINE, console.width)
    source = f"fitted to {run_dir}" if run_dir is not None else "from stated costs alone"
    console.print(plan_table(tried, chosen, f"{name}, {source}"), crop=False)
    if basis.fitted:
        console.out(f"fitted: {assumptions(basis.costs, basis.fitted)}")
    console.out(f"stated: {assumptions(basis.costs, basis.stated)}")
    for note in basis.notes:
        console.out(f"note: {note}")
    for failure in dict.fromkeys(cell.outcome.failure for cell in tried if cell.outcome.failure):
        console.out(f"would end: {failure}")
    console.out(why)


def _as_json(
    name: str, run_dir: str | None, basis: Basis, tried: list[Cell], chosen: Cell | None, why: str
) -> dict[str, Any]:
    return {
        "recipe": name,
        "run": run_dir,
        "costs": msgspec.to_builtins(basis.costs),
        "fitted": basis.fitted,
        "notes": basis.notes,
        "cells": [_cell(cell) for cell in tried],
        "recommended": None if chosen is None else _cell(chosen),
        "why": why,
    }


def _cell(cell: Cell) -> dict[str, Any]:
    settings = {"workers": cell.workers, "max_staleness": cell.max_staleness, "batch_groups": cell.batch_groups}
    return settings | asdict(cell.outcome)
