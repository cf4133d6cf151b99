"""How fast and how good are the suffix automata, beside arctic-inference's trees?

    python benchmarks/bench_suffix_tree.py --json benchmarks/results/bench_suffix_tree.json [--run RUN_DIR]

Synthetic: 1 M tokens of 16 problems, 64 rollouts each, that branch off and rejoin. With `--run`, also the rollouts
of a real run that was made with `draft.record=true`. Everything is measured in turns, five times, medians. Needs
`pip install -e '.[bench]'` for arctic-inference 0.3.0, a C++ build.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from arctic_inference.suffix_decoding._C import SuffixTree  # pyright: ignore[reportMissingImports]
from common import Bar, hardware, write_result

from databus.codec import Array
from echelon.draft_replay import ArcticSpeculator, EchelonSpeculator, GroupReplayer, Speculator, Tally
from echelon.rollout_record import RolloutRecord, read_rollouts
from echelon.run_folder import RunFolder
from rollout.config import DraftConfig
from rollout.drafting.drafter import Drafter
from rollout.drafting.index import SuffixIndex, Text
from rollout.drafting.latency import LatencyModel
from rollout.drafting.proposer import flatten

REPEATS = 5
VOCABULARY = 2000
BATCH = 256
MAX_DRAFTS = 16

Step = Callable[[list[list[int]]], None]
"""A round, given what every request has just sampled, as vLLM's runner gives it to a proposer."""

FIRST_STEPS = 10


# ---------------------------------------------------------------- rollouts


def branching_rollouts(problems: int, rollouts: int, length: int, seed: int = 0) -> list[list[Array]]:
    """For each problem, rollouts that follow one of five solutions, change between them, and slip now and then."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(problems):
        ways = rng.integers(0, VOCABULARY, (5, length)).astype(np.int32)
        found.append([_one_rollout(rng, ways) for _ in range(rollouts)])
    return found


def _one_rollout(rng: np.random.Generator, ways: Array) -> Array:
    way, text = 0, []
    for place in range(ways.shape[1]):
        if rng.random() < 0.03:
            way = 0 if way else int(rng.integers(1, len(ways)))
        if rng.random() < 0.01:
            text.append(int(rng.integers(VOCABULARY)))
        text.append(int(ways[way, place]))
    return np.array(text[: ways.shape[1]], np.int32)


def as_records(rollouts: list[list[Array]], group_size: int) -> list[RolloutRecord]:
    """Epoch after epoch, each problem's next `group_size` rollouts; the policy version counts epochs."""
    return [
        _as_record(problem, epoch, texts[epoch * group_size : (epoch + 1) * group_size])
        for epoch in range(len(rollouts[0]) // group_size)
        for problem, texts in enumerate(rollouts)
    ]


def _as_record(problem: int, epoch: int, texts: list[Array]) -> RolloutRecord:
    def packed(*numbers: int) -> bytes:
        return np.array(numbers, "<i4").tobytes()

    tokens = np.concatenate(texts)
    return RolloutRecord(
        problem=problem + 1,
        cursor=problem,
        epoch=epoch,
        group_id=f"{epoch}/{problem}",
        prompt_ids=packed(problem),
        lengths=packed(*map(len, texts)),
        token_ids=tokens.astype("<i4").tobytes(),
        version_values=packed(epoch),
        version_lengths=packed(len(tokens)),
    )


# ---------------------------------------------------------------- building


def build_ours(rollouts: list[list[Array]]) -> SuffixIndex:
    index = SuffixIndex(max_tokens=1 << 30, window=8, vocab_size=VOCABULARY)
    for number, texts in enumerate(rollouts, start=1):
        problem = index.problem(number, np.zeros(1, np.int32))
        for place, text in enumerate(texts):
            index.add(problem, Text(text, 0, place, place))
    return index


def build_arctic(rollouts: list[list[Array]], depth: int) -> list[SuffixTree]:
    trees = []
    for texts in rollouts:
        tree = SuffixTree(depth)
        for place, text in enumerate(texts):
            tree.extend_ndarray(place, text)
        trees.append(tree)
    return trees


def measure_building(rollouts: list[list[Array]]) -> dict[str, Any]:
    tokens = sum(len(text) for texts in rollouts for text in texts)
    build_ours([texts[:1] for texts in rollouts])  # compiles
    builders: dict[str, Callable[[], Any]] = {
        "ours": lambda: build_ours(rollouts),
        "arctic depth 24": lambda: build_arctic(rollouts, 24),
        "arctic depth 64": lambda: build_arctic(rollouts, 64),
    }
    times: dict[str, list[float]] = {name: [] for name in builders}
    sizes: dict[str, float] = {}
    for _ in range(REPEATS):
        for name, build in builders.items():
            started = time.perf_counter()
            built = build()
            times[name].append((time.perf_counter() - started) / tokens * 1e9)
            total = built.num_bytes if name == "ours" else sum(tree.estimate_memory() for tree in built)
            sizes[name] = total / tokens
            del built
    return {
        name: {
            "build_ns_per_token": statistics.median(times[name]),
            "build_ns_per_token_least": min(times[name]),
            "bytes_per_token": sizes[name],
        }
        for name in builders
    }


# ---------------------------------------------------------------- a step


def measure_step(rollouts: list[list[Array]], steps: int = 200) -> dict[str, float]:
    """Microseconds a request a step at 256 running requests on warm trees, ours and vLLM's suffix proposer."""
    past, current = [texts[:-16] for texts in rollouts], [texts[-16:] for texts in rollouts]
    texts = [text for group in current for text in group][:BATCH]
    problems = [1 + place // 16 for place in range(len(texts))]
    ours, theirs = _our_step(past, problems), _their_step(past)
    totals: dict[str, list[float]] = {"ours": [], "vllm": []}
    for name, begin in (("ours", ours), ("vllm", theirs)):
        step = begin(texts)
        for number in range(steps):
            sampled = [text[number : number + 1 + (number + row) % 3].tolist() for row, text in enumerate(texts)]
            started = time.perf_counter()
            step(sampled)
            if number >= FIRST_STEPS:
                totals[name].append((time.perf_counter() - started) / len(texts) * 1e6)
    return {f"{name}_us": statistics.median(values) for name, values in totals.items()}


def _our_step(past: list[list[Array]], problems: list[int]) -> Callable[[list[Array]], Step]:
    def begin(texts: list[Array]) -> Step:
        config = DraftConfig(policy="marginal", max_tokens=MAX_DRAFTS, window_versions=1000)
        drafter = Drafter(config, max_sequences=BATCH, vocab_size=VOCABULARY, context_tokens=4096)
        slots = [
            drafter.add(
                problem=problem,
                prompt_ids=np.zeros(1, np.int32),
                history=[(0, 0, text) for text in past[problem - 1]] if row % 16 == 0 else [],
                group=problem,
                max_tokens=4096,
            )
            for row, problem in enumerate(problems)
        ]
        rows = np.array(slots, np.int32)

        def step(sampled: list[list[int]]) -> None:
            drafter.propose(rows, *flatten(sampled), decode_only=True, num_scheduled_tokens=len(rows))

        return step

    return begin


def _their_step(past: list[list[Array]]) -> Callable[[list[Array]], Step]:
    """vLLM 0.32.0's own loop, with just what it looks at: its configuration and the batch."""
    from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

    def begin(texts: list[Array]) -> Step:
        speculative = SimpleNamespace(
            num_speculative_tokens=MAX_DRAFTS,
            suffix_decoding_max_tree_depth=24,
            suffix_decoding_max_spec_factor=1.0,
            suffix_decoding_min_token_prob=0.1,
            suffix_decoding_max_cached_requests=10_000,
        )
        model = SimpleNamespace(max_model_len=1 << 16)
        config: Any = SimpleNamespace(speculative_config=speculative, model_config=model)
        proposer: Any = SuffixDecodingProposer(config)
        for number, group in enumerate(past):
            for place, text in enumerate(group):
                name = f"past {number} {place}"
                proposer.suffix_cache.start_request(name, np.zeros(1, np.int32))
                proposer.suffix_cache.add_active_response(name, text)
                proposer.suffix_cache.stop_request(name)
        names = [f"{row}" for row in range(len(texts))]
        batch: Any = SimpleNamespace(
            req_ids=names,
            req_id_to_index={name: row for row, name in enumerate(names)},
            num_tokens_no_spec=np.ones(len(names), np.int32),
            num_prompt_tokens=np.ones(len(names), np.int32),
            token_ids_cpu=np.zeros((len(names), 4096), np.int32),
        )

        def step(sampled: list[list[int]]) -> None:
            for row, tokens in enumerate(sampled):
                at = batch.num_tokens_no_spec[row]
                batch.token_ids_cpu[row, at : at + len(tokens)] = tokens
                batch.num_tokens_no_spec[row] += len(tokens)
            proposer.propose(MAX_DRAFTS, batch, sampled)

        return step

    return begin


# ---------------------------------------------------------------- how much is accepted


class FixedCost(LatencyModel):
    """A step that costs what the benchmark says, so that a policy drafts more or less."""

    def __init__(self, token_share: float) -> None:
        self._fixed = (1e-2, 0.0, 1e-2 * token_share)

    @property
    def coefficients(self) -> tuple[float, float, float]:
        return self._fixed

    def observe(self, seconds: float, num_requests: int, num_tokens: int) -> None:
        pass


class PerProblem:
    """A `Speculator` that has one of its own for every problem, as SuffixDecoding's authors have it."""

    def __init__(self, make: Callable[[], Speculator]) -> None:
        self._make = make
        self._speculators: dict[int, Speculator] = {}

    def begin(self, record: RolloutRecord) -> None:
        if record.problem not in self._speculators:
            self._speculators[record.problem] = self._make()
        self._current = self._speculators[record.problem]
        self._current.begin(record)

    def propose(self, rows: Sequence[int], new: Sequence[Array], scheduled: int, first: bool) -> list[Array]:
        return self._current.propose(rows, new, scheduled, first)

    def end(self) -> None:
        self._current.end()


def replay(records: Sequence[RolloutRecord], speculator: Speculator) -> dict[str, float]:
    """Tokens drafted and accepted a round of one completion."""
    tally, replayer = Tally(), GroupReplayer(speculator)
    for record in records:
        for one in replayer.replay(record):
            tally.add(one)
    return {"drafted_per_round": tally.drafted / tally.rounds, "accepted_per_round": tally.accepted_per_round}


def replay_ours(records: Sequence[RolloutRecord], token_share: float) -> dict[str, float]:
    longest = max(len(text) for record in records for text in record.completions())
    vocabulary = 1 + max(int(text.max(initial=0)) for each in records for text in [each.prompt(), *each.completions()])
    drafter = Drafter(
        DraftConfig(policy="marginal", max_tokens=MAX_DRAFTS),
        max_sequences=64,
        vocab_size=vocabulary,
        context_tokens=longest,
        latency=FixedCost(token_share),
    )
    return replay(records, EchelonSpeculator(drafter, longest + MAX_DRAFTS))


def replay_arctic(
    records: Sequence[RolloutRecord], depth: int, factor: float, probability: float, per_problem: bool
) -> dict[str, float]:
    def make() -> Speculator:
        return ArcticSpeculator(MAX_DRAFTS, depth, factor, probability)

    return replay(records, PerProblem(make) if per_problem else make())


def measure_acceptance(records: Sequence[RolloutRecord]) -> dict[str, Any]:
    """Both at several settings, and ours at as many drafted tokens as each setting of arctic's, interpolated."""
    shares = (1e-4, 3e-3, 1e-2, 3e-2, 1e-1, 0.3)
    ours = [replay_ours(records, share) for share in shares]
    arctic = {
        f"depth {depth}, factor {factor:g}, probability {probability:g}, {'a tree a problem' if own else 'one tree'}": (
            replay_arctic(records, depth, factor, probability, per_problem=own)
        )
        for own in (True, False)
        for depth in (24, 64)
        for factor in (1.0, 4.0)
        for probability in (0.1, 0.3, 0.5)
    }
    curve = sorted((each["drafted_per_round"], each["accepted_per_round"]) for each in ours)
    drafted, accepted = [0.0, *(d for d, _ in curve)], [0.0, *(a for _, a in curve)]
    for figures in arctic.values():
        at_equal = float(np.interp(figures["drafted_per_round"], drafted, accepted))
        figures["ours_accepted_at_equal_drafted"] = at_equal
        figures["ours_to_theirs"] = at_equal / figures["accepted_per_round"]
    best = max(arctic, key=lambda name: arctic[name]["accepted_per_round"])
    return {
        "ours": dict(zip(map(str, shares), ours, strict=True)),
        "arctic": arctic,
        "arctic_best": best,
        "ours_to_arctic_best": arctic[best]["ours_to_theirs"],
        "ours_to_arctic_least": min(figures["ours_to_theirs"] for figures in arctic.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="a run that recorded its rollouts")
    args = parser.parse_args()
    rollouts = branching_rollouts(problems=16, rollouts=64, length=1000)
    building = measure_building(rollouts)
    steps = measure_step(rollouts)
    acceptance = {"synthetic": measure_acceptance(as_records([texts[:32] for texts in rollouts[:6]], 8))}
    if args.run is not None:
        acceptance["recorded"] = measure_acceptance(list(read_rollouts(RunFolder(args.run).rollouts_file)))
    ours = building.pop("ours")
    fastest = min(figures["build_ns_per_token"] for figures in building.values())
    bars = [
        Bar("build, ns a token", ours["build_ns_per_token"], 300, "at most"),
        Bar("build, times as fast as arctic", fastest / ours["build_ns_per_token"], 7, "at least"),
        Bar("memory, bytes a token", ours["bytes_per_token"], 100, "at most"),
        Bar("a step at 256 requests, us a request", steps["ours_us"], 2, "at most"),
        Bar("a step, times as fast as vLLM's suffix loop", steps["vllm_us"] / steps["ours_us"], 20, "at least"),
        *(
            Bar(f"accepted a round to arctic's best, {name}", figures["ours_to_arctic_best"], 1.0, "at least")
            for name, figures in acceptance.items()
        ),
    ]
    question = (__doc__ or "").splitlines()[0]
    figures = {"building": ours, "step": {"us_per_request": steps["ours_us"]}, "acceptance": acceptance}
    peers = {"arctic-inference 0.3.0": building, "vLLM's suffix proposer": {"us_per_request": steps["vllm_us"]}}
    write_result(args.json, question=question, figures=figures, peers=peers, bars=bars, device=hardware())


if __name__ == "__main__":
    main()
