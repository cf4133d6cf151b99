"""What a plan is asked for: settings, `assume.NAME=VALUE`, and the run that it is fitted to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import inspect

from echelon.config import RunConfig
from echelon.plan.costs import Costs
from echelon.plan.fit import fit_costs, stated_costs
from echelon.plan.trace import Trace, read_trace
from echelon.plan.workload import RecordedLengths, StatedLengths, Workload
from echelon.prompt_files import PromptFile
from echelon.run_folder import RunFolder
from echelon.settings import describe, flatten, is_allowed, parse_value

PREFIX = "assume."
ENGINE = ("step_s", "sequence_s", "tokens_per_step", "score_s")
ROLES = ("train_s", "train_token_s", "publish_s", "sync_s", "pause_s")
ALWAYS_STATED = ("bus_s", "cores", "worker_cores", "learner_cores")
WORKLOAD = ("length_mean", "length_spread", "problems", "prompt_tokens", "pass_rate", "eval_problems")
SAME = ("model", "rollout.engine", "rollout.device", "rollout.dtype", "learner.device", "learner.ranks", "draft.policy")
"""Settings on which costs depend, and of which the plan knows nothing else than what the run had."""


@dataclass(frozen=True)
class Basis:
    """What all simulated runs share. fitted, stated: names of costs, by where they come from. notes: a line each."""

    costs: Costs
    workload: Callable[[], Workload]
    fitted: tuple[str, ...]
    stated: tuple[str, ...]
    notes: tuple[str, ...] = ()


def split_words(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(what is no setting, overrides of the recipe, what to assume)."""
    plain = [word for word in words if "=" not in word]
    assumed = [word.removeprefix(PREFIX) for word in words if "=" in word and word.startswith(PREFIX)]
    return plain, [word for word in words if "=" in word and not word.startswith(PREFIX)], assumed


def parse_assumed(words: Sequence[str]) -> dict[str, int | float]:
    """NAME=VALUE each. Raises: ValueError, in one line."""
    node = inspect.type_info(Costs)
    assert isinstance(node, inspect.StructType)
    kinds = {field.name: field.type for field in node.fields}
    values: dict[str, int | float] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in kinds:
            raise ValueError(f"unknown setting {PREFIX + name!r} (assume has: {', '.join(kinds)})")
        try:
            value = parse_value(text, kinds[name])
        except ValueError:
            value = None
        if value is None or not is_allowed(value, kinds[name]):
            raise ValueError(f"{PREFIX}{name}={text}: expected {describe(kinds[name])}")
        values[name] = value
    return values


def make_basis(config: RunConfig, run_dir: str | None, assumed: dict[str, int | float]) -> Basis:
    """Raises: ValueError, in one line, for a run that cannot be fitted to."""
    if config.placement == "colocated":
        raise ValueError("placement is colocated: a plan is of learner and workers on devices of their own")
    costs = msgspec.structs.replace(stated_costs(config), **assumed)
    if run_dir is None:
        stated = (*ENGINE, *ROLES, *ALWAYS_STATED, *WORKLOAD)
        return Basis(costs, lambda: StatedLengths(costs, config.seed), (), stated)
    folder = RunFolder(run_dir)
    trace = read_trace(folder)
    of_run = folder.config()
    evals = _num_lines(folder)
    costs = msgspec.structs.replace(fit_costs(of_run, trace, costs), eval_problems=evals)
    costs = msgspec.structs.replace(costs, **assumed)
    prompts = PromptFile(folder.train_prompts, seed=0, shuffle=False)
    fitted = tuple(name for name in (*ENGINE, *ROLES) if name not in assumed)
    return Basis(
        costs,
        lambda: recorded_lengths(trace, prompts, config.seed),
        fitted,
        (*(name for name in (*ENGINE, *ROLES) if name in assumed), *ALWAYS_STATED),
        _differences(config, of_run),
    )


def recorded_lengths(trace: Trace, prompts: PromptFile, seed: int) -> RecordedLengths:
    numbers = {prompts.at(index).prompt_ids: index for index in range(len(prompts))}
    groups = [(numbers.get(group.prompt, -1), group.group) for group in trace.groups]
    return RecordedLengths(groups, prompts.prompt_tokens(), seed)


def _num_lines(folder: RunFolder) -> int:
    file = folder.eval_prompts
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _differences(config: RunConfig, of_run: RunConfig) -> tuple[str, ...]:
    ours, theirs = (flatten(msgspec.to_builtins(each)) for each in (config, of_run))
    return tuple(
        f"the run that costs are fitted to had {name}={theirs[name]}, the recipe has {ours[name]}: costs are the run's"
        for name in SAME
        if ours[name] != theirs[name]
    )
