"""`echelon bench-draft`: what drafting would have given on a run's own completions, in the order they came in."""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from echelon.draft_replay import ArcticSpeculator, EchelonSpeculator, GroupReplayer, Tally, arctic_is_installed
from echelon.rollout_record import RolloutRecord, read_rollouts
from echelon.run_folder import RunFolder
from rollout.config import DraftConfig

OURS, ARCTIC = "echelon", "arctic-inference"

MakeDrafter = Callable[..., Any]
Tallies = dict[str, dict[int, Tally]]


def execute(args: argparse.Namespace, make_drafter: MakeDrafter | None = None) -> int:
    """Raises: ValueError, in one line, where RUN_DIR is no run's folder or has kept no rollouts.

    Args: make_drafter: in place of `rollout.drafting.drafter.Drafter`, for tests.
    """
    folder = RunFolder(args.run_dir)
    config = folder.config()
    draft = msgspec.structs.replace(config.draft, policy=args.policy, **_given(max_tokens=args.max_tokens))
    size, vocabulary = _extent(folder.rollouts_file)
    if make_drafter is None:
        from rollout.drafting.drafter import Drafter as make_drafter  # pyright: ignore[reportMissingImports]
    assert make_drafter is not None
    context = config.rollout.context_tokens
    drafter = make_drafter(draft, max_sequences=size, vocab_size=vocabulary, context_tokens=context)
    replayers = {OURS: GroupReplayer(EchelonSpeculator(drafter, config.rollout.max_tokens))}
    if arctic_is_installed():
        replayers[ARCTIC] = GroupReplayer(ArcticSpeculator(draft.max_tokens))
    tallies = replay_all(read_rollouts(folder.rollouts_file), replayers)
    _print(draft, tallies, replayers, drafter.counters())
    return 0


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _extent(file: Path) -> tuple[int, int]:
    """(completions of the largest group, ids of the vocabulary that occur). Raises: ValueError."""
    size = vocabulary = 0
    for record in read_rollouts(file):
        size = max(size, len(record.completions()))
        tokens = [record.prompt(), *record.completions()]
        vocabulary = max(vocabulary, *(int(each.max(initial=-1)) + 1 for each in tokens))
    if size == 0:
        raise ValueError(f"{file} holds no group yet")
    return size, vocabulary


def replay_all(records: Iterable[RolloutRecord], replayers: Mapping[str, GroupReplayer]) -> Tallies:
    """By replayer and epoch."""
    tallies: Tallies = {name: defaultdict(Tally) for name in replayers}
    for record in records:
        for name, replayer in replayers.items():
            for one in replayer.replay(record):
                tallies[name][record.epoch].add(one)
    return tallies


# ---------------------------------------------------------------- output


def _print(
    draft: DraftConfig, tallies: Tallies, replayers: Mapping[str, GroupReplayer], counters: Mapping[str, float]
) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.print(f"policy {draft.policy}, at most {draft.max_tokens} tokens a draft; a round is one completion's")
    console.print(_by_epoch(tallies, replayers))
    rounds = sum(tally.rounds for tally in tallies[OURS].values())
    for title, parts in by_part(counters).items():
        console.print(_by_part(title, parts, rounds))
    if ARCTIC not in tallies:
        console.print(
            "arctic-inference is not installed, so there is nothing to compare with: `pip install -e .\\[bench]`"
        )


def _by_epoch(tallies: Tallies, replayers: Mapping[str, GroupReplayer]) -> Table:
    table = Table("epoch", "drafter", title="accepted tokens a round", title_justify="left")
    for name in ("accepted a round", "drafted a round", "acceptance", "µs a request"):
        table.add_column(name, justify="right")
    for epoch in sorted({epoch for each in tallies.values() for epoch in each}):
        for name, each in tallies.items():
            table.add_row(str(epoch), name, *_figures(each[epoch]), "")
    for name, each in tallies.items():
        whole = Tally(*(sum(getattr(tally, field) for tally in each.values()) for field in Tally.__match_args__))
        time_us = 1e6 * replayers[name].propose_s / max(1, whole.rounds)
        table.add_row("all", name, *_figures(whole), f"{time_us:.1f}", style="bold")
    return table


def _figures(tally: Tally) -> tuple[str, str, str]:
    drafted = tally.drafted / max(1, tally.rounds)
    return f"{tally.accepted_per_round:.3f}", f"{drafted:.3f}", f"{tally.acceptance:.3f}"


def by_part(counters: Mapping[str, float]) -> dict[str, dict[str, tuple[float, float]]]:
    """What a drafter counts as `drafted_X` and `accepted_X`, by source and by lag: X -> (drafted, accepted)."""
    parts: dict[str, dict[str, tuple[float, float]]] = {"source": {}, "lag": {}}
    for name, drafted in counters.items():
        part = name.removeprefix("drafted_")
        if part != name and f"accepted_{part}" in counters:
            lag = re.fullmatch(r"lag(\d+)", part)
            parts["lag" if lag else "source"][lag[1] if lag else part] = (drafted, counters[f"accepted_{part}"])
    return {title: found for title, found in parts.items() if found}


def _by_part(title: str, parts: Mapping[str, tuple[float, float]], rounds: int) -> Table:
    heading = "source" if title == "source" else "lag, at least"
    table = Table(heading, title=f"echelon, by {title}", title_justify="left")
    for name in ("accepted a round", "drafted a round", "acceptance"):
        table.add_column(name, justify="right")
    for name, (drafted, accepted) in parts.items():
        table.add_row(name, *_figures(Tally(rounds, int(drafted), int(accepted))))
    return table
