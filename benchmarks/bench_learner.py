"""How many tokens a second does the learner train, beside TRL and a plain padded loop, and at what cost in memory?

    python benchmarks/bench_learner.py --json benchmarks/results/bench_learner.json

Tokens a second: a batch of completions with log-normal lengths, the longest 16 times the median, is trained by this
learner (FSDP2, one rank), by TRL's GRPOTrainer and by a plain loop over padded batches with full logits. Same model,
same completions, same loss (token mean), same optimizer and fp32, in one process, step by step in turn. TRL's own
training loop runs as it is, without gradient checkpointing (a default that costs time); only its generation is
replaced, and the time of that, of its scoring and of its padding is left out. Ours has everything from groups to the
updated weights in it. A token is a prompt's or a completion's, never padding. What explains most of the difference is
written down beside it: through how many positions, padding included, each learner puts its model. TRL pads all
completions of a batch to the longest of all; the padded loop to the longest of four.

Head: log-probabilities and entropy from hidden states, forward and backward, at the vocabulary of Qwen2.5-0.5B and its
hidden size, against full logits; peak resident memory beyond hidden states and weight, gradients included.

Linear: seconds a token of whole steps, batches of 1k to 64k tokens made of the same 1k tokens of sequences; the bound
is on the most that a token costs over what it does in any smaller batch. What a step costs whatever its batch makes
small ones dearer, which is no breach of it. About 8 minutes on two cores that do nothing else.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Bar, hardware, write_result
from learner_batch import long_tailed_lengths, make_groups, num_inputs, write_model
from learner_head import HEADS, inputs, measure
from learner_peers import PaddedLoop, train_with_trl
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from databus.groups import Group
from learner.config import LearnerConfig, LossConfig
from learner.model import ModelOptions, build_model
from learner.optimizer import build_optimizer
from learner.run import process_group
from learner.train_step import TrainStep

MODEL = {"vocabulary": 24_576, "hidden": 384, "layers": 6}
COMPLETIONS, GROUP_SIZE, PROMPT_TOKENS, MEDIAN, LONGEST = 32, 8, 16, 48, 768
SMALL_MODEL = {"vocabulary": 8_192, "hidden": 256, "layers": 4}
SIZES = (1, 4, 16, 64)
HEAD_TOKENS, HEAD_HIDDEN, HEAD_VOCABULARY = 4096, 896, 151_936
CONFIG = LearnerConfig(lr=1e-5, loss=LossConfig(proximal="sampled", correction="none"))
MIB = 1 << 20
TRL = "TRL GRPOTrainer"


def ours(model: Path) -> Callable[[list[Group]], object]:
    policy = build_model(model, ModelOptions(logprob_chunk_tokens=CONFIG.logprob_chunk_tokens))
    train_step = TrainStep(policy, *build_optimizer(policy.parameters(), CONFIG), CONFIG)
    return lambda groups: train_step(groups, 0)


def seconds_of(step: Callable[[list[Group]], object], groups: list[Group]) -> float:
    start = time.perf_counter()
    step(groups)
    return time.perf_counter() - start


@contextmanager
def counted_positions() -> Iterator[Callable[[], int]]:
    """Inside, the result says how many positions have been embedded, padding included, since it was asked last."""
    embedded = 0

    def look(module: nn.Module, inputs: Any) -> None:
        nonlocal embedded
        embedded += inputs[0].numel() if isinstance(module, nn.Embedding) else 0

    def since_last() -> int:
        nonlocal embedded
        count, embedded = embedded, 0
        return count

    hook = register_module_forward_pre_hook(look)
    try:
        yield since_last
    finally:
        hook.remove()


def against_peers(folder: Path, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was trained, tokens/s of each learner)."""
    num_parameters = write_model(folder / "model", **MODEL)
    lengths = long_tailed_lengths(COMPLETIONS, MEDIAN, LONGEST)
    groups = make_groups(lengths, group_size=GROUP_SIZE, prompt_tokens=PROMPT_TOKENS, vocabulary=MODEL["vocabulary"])
    steps = {"echelon": ours(folder / "model"), "padded loop": PaddedLoop(folder / "model", CONFIG).step}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    positions: dict[str, int] = {}

    with counted_positions() as since_last:

        def one_each() -> None:
            positions[TRL] = since_last()
            for name, step in steps.items():
                seconds[name].append(seconds_of(step, groups))
                positions[name] = since_last()
                print(f"{name}: {num_inputs(groups) / seconds[name][-1]:,.0f} tokens/s", flush=True)

        seconds[TRL] = train_with_trl(folder / "model", folder / "trl", groups, CONFIG, repeats + 1, one_each)
    rates = {name: [num_inputs(groups) / each for each in values[1:]] for name, values in seconds.items()}
    batch = {
        "parameters": num_parameters,
        "tokens": num_inputs(groups),
        "completion_lengths": sorted(lengths.tolist()),
        "positions": positions,
    }
    return batch, {name: spread(values) for name, values in rates.items()}


def head(repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of each head, by name."""
    tensors = inputs(HEAD_TOKENS, HEAD_HIDDEN, HEAD_VOCABULARY)
    costs: dict[str, Any] = {name: [] for name in HEADS}
    for _ in range(repeats):
        for name, function in HEADS.items():
            costs[name].append(measure(function, *tensors))
            print(f"{name}: {costs[name][-1].seconds:.1f} s, {costs[name][-1].peak_bytes / MIB:,.0f} MiB", flush=True)
    return {
        name: {
            "seconds": spread([cost.seconds for cost in values]),
            "peak_mib": max(cost.peak_bytes for cost in values) / MIB,
        }
        for name, values in costs.items()
    }


def by_tokens(folder: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds a token of whole steps, by thousands of tokens."""
    write_model(folder / "small", **SMALL_MODEL)
    step = ours(folder / "small")
    unit = long_tailed_lengths(16, 24, 6 * 24)
    unit[-1] += 1024 - int(unit.sum()) - 15 * len(unit)  # with prompts of 16 tokens: 1,024 positions
    batches = {
        size: make_groups(
            unit.repeat(size), group_size=GROUP_SIZE, prompt_tokens=PROMPT_TOKENS, vocabulary=SMALL_MODEL["vocabulary"]
        )
        for size in SIZES
    }
    step(batches[4])  # warm-up
    costs: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(repeats):
        for size, groups in batches.items():
            costs[size].append(1000 * seconds_of(step, groups) / num_inputs(groups))
            print(f"{size}k tokens: {costs[size][-1]:.3f} ms a token", flush=True)
    return {f"{size}k": spread(values) for size, values in costs.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def bars(rates: dict[str, Any], heads: dict[str, Any], linear: dict[str, Any]) -> list[Bar]:
    own, full = heads["ours"], heads["full logits"]
    head_speed = full["seconds"]["median"] / own["seconds"]["median"]
    costs = [values["median"] for values in linear.values()]
    growth = max(later / min(costs[:size]) for size, later in enumerate(costs) if size > 0)
    speedup = rates["echelon"]["median"] / rates[TRL]["median"]
    return [
        Bar("trained tokens/s over TRL's", speedup, 2, "at least"),
        Bar("peak memory of the head over full logits'", own["peak_mib"] / full["peak_mib"], 1 / 8, "at most"),
        Bar("speed of the head over full logits'", head_speed, 0.9, "at least"),
        Bar("seconds a token over those in a smaller batch, 1k to 64k tokens", growth, 1.15, "at most"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["peers", "head", "linear"], help="one part, without a result file")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name, process_group("cpu", timeout_s=60.0):
        parts: dict[str, Callable[[], Any]] = {
            "head": lambda: head(args.repeats),
            "linear": lambda: by_tokens(Path(name), args.repeats),
            "peers": lambda: against_peers(Path(name), args.repeats),
        }
        if args.only:
            print(parts[args.only]())
            return
        results = {part: run() for part, run in parts.items()}
    batch, rates = results["peers"]
    write_result(
        args.json,
        question=(__doc__ or "").splitlines()[0],
        figures={
            "batch": batch,
            "tokens_per_s": rates["echelon"],
            "head": results["head"],
            "ms_a_token": results["linear"],
        },
        peers={name: rates[name] for name in rates if name != "echelon"},
        bars=bars(rates, results["head"], results["linear"]),
        device=hardware(),
    )


if __name__ == "__main__":
    main()
