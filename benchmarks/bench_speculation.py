"""Does drafting from earlier completions make rollouts faster, and by how much more than vLLM's own methods?

    python benchmarks/bench_speculation.py --json benchmarks/results/bench_speculation.json

Real vLLM on the CPU, T = 1, fixed weights. `bulk`: a trained chain-sum model completes 64 problems x 4 samples, the
same ones in 4 epochs. `tail`: then the 4 longest problems alone, one sample each. `random`: a model of 4096 nearly
uniform tokens, where drafting can win nothing. Peers are no drafting, and vLLM's `suffix` (arctic-inference, from the
`bench` extra) and `ngram`, which get the mended sampler too: without it they sample something else.

Every variant is an engine in a process of its own. They take turns, epoch by epoch; an engine that has had its turn
is left alone until it no longer spins. Repetitions take new problems, so that each begins without history. Ratios are
of one epoch or round of a variant to the same one of a peer; medians of them. About 20 minutes on two cores.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Bar, hardware, write_result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROBLEMS, SAMPLES, EPOCHS, TAIL_ROUNDS = 64, 4, 4, 12
RANDOM_EPOCHS = 8
"""More of them: what is asked there is a few per cent, and an epoch varies by a fifth."""
TAIL_PROBLEMS = 4
SETTLE_S = 1.5
"""vLLM 0.32.0 waits for new work without sleeping, but for a second only. (Stopping it by a signal instead makes it
lose wake-ups: the next step then takes five seconds.)"""
MAX_TOKENS, RANDOM_TOKENS, RANDOM_VOCABULARY = 192, 96, 4096
DRAFT_TOKENS = 16
PEERS: dict[str, dict[str, Any]] = {
    "suffix": {"method": "suffix", "num_speculative_tokens": DRAFT_TOKENS},
    "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
}
VARIANTS = ("none", "ours", *PEERS)
PARTS = ("chain-sum", "random")


# ------------------------------------------------------------ one variant, in its own process


class Rollouts:
    """An engine and what it is asked for."""

    def __init__(self, variant: str, model: Path) -> None:
        from rollout.config import DraftConfig, RolloutConfig
        from rollout.engine import vllm_engine

        policy = "marginal" if variant == "ours" else "off"
        self._peer = variant in PEERS
        if self._peer:
            vllm_engine.engine_arguments = _with_speculation(vllm_engine.engine_arguments, PEERS[variant])
        self._engine = vllm_engine.VllmEngine(
            RolloutConfig(context_tokens=256, max_sequences=PROBLEMS * SAMPLES),
            str(model),
            seed=0,
            version=0,
            draft=DraftConfig(policy=policy, max_tokens=DRAFT_TOKENS),
        )
        self._turn = 0

    async def start(self) -> None:
        await self._engine.start()
        if self._peer:
            await self._engine._llm.collective_rpc("echelon_mend_sampler")
        await self.complete([[3, 4, 5]] * PROBLEMS, SAMPLES, 8)

    async def complete(self, prompts: list[list[int]], samples: int, max_tokens: int) -> dict[str, float]:
        """All at once. Returns: tokens, seconds, and what was drafted."""
        from databus.messages import Sampling
        from rollout.engine.base import GenerateRequest

        self._turn += 1
        requests = [
            GenerateRequest(
                group_id=f"{self._turn}.{index}",
                prompt_ids=tuple(prompt),
                group_size=samples,
                sampling=Sampling(max_tokens=max_tokens, temperature=1.0),
            )
            for index, prompt in enumerate(prompts)
        ]
        before = self._engine.stats().drafting
        started = time.perf_counter()
        groups = await asyncio.gather(*map(self._engine.generate, requests))
        elapsed = time.perf_counter() - started
        after = self._engine.stats().drafting
        drafting = {f: after[f] - before[f] for f in ("drafted", "accepted", "rounds", "propose_s") if f in after}
        tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        return {"tokens": tokens, "seconds": elapsed, **drafting}

    async def close(self) -> None:
        await self._engine.close()


def _with_speculation(arguments: Any, speculation: dict[str, Any]) -> Any:
    def with_speculation(*given: Any) -> Any:
        made = arguments(*given)
        made.speculative_config = dict(speculation)
        return made

    return with_speculation


async def serve(variant: str, model: Path) -> None:
    """A job a line on stdin, its figures a line on stdout."""
    from databus.process import die_with_parent

    die_with_parent()
    rollouts = Rollouts(variant, model)
    await rollouts.start()
    print("ready", flush=True)
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await rollouts.complete(**json.loads(line))), flush=True)
    finally:
        await rollouts.close()


# ------------------------------------------------------------ the variants together


class Variant:
    """A process that serves one variant."""

    def __init__(self, name: str, model: Path) -> None:
        command = [sys.executable, __file__, "--serve", name, "--model", str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
        )
        self._expect("ready")

    def complete(self, prompts: list[list[int]], samples: int, max_tokens: int) -> dict[str, float]:
        assert self._process.stdin is not None
        job = {"prompts": prompts, "samples": samples, "max_tokens": max_tokens}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        figures = json.loads(self._expect("{"))
        time.sleep(SETTLE_S)
        return figures

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _expect(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError("a variant has ended early; see its output above")


@contextlib.contextmanager
def running(names: list[str], model: Path) -> Iterator[dict[str, Variant]]:
    variants: dict[str, Variant] = {}
    try:
        for name in names:
            variants[name] = Variant(name, model)
        yield variants
    finally:
        for variant in variants.values():
            variant.end()


Figures = dict[str, list[list[dict[str, float]]]]
"""By variant: for each repetition, the figures of its epochs or rounds."""


def chain_sum(names: list[str], repeats: int, model: Path, prompts: list[list[int]]) -> tuple[Figures, Figures]:
    """Bulk and tail."""
    bulk: Figures = {name: [] for name in names}
    tail: Figures = {name: [] for name in names}
    with running(names, model) as variants:
        for repeat in range(repeats):
            problems = prompts[repeat * PROBLEMS : (repeat + 1) * PROBLEMS]
            longest = sorted(problems, key=len)[-TAIL_PROBLEMS:]
            _take_turns(variants, bulk, EPOCHS, problems, SAMPLES, MAX_TOKENS)
            _take_turns(variants, tail, TAIL_ROUNDS, longest, 1, MAX_TOKENS)
    return bulk, tail


def random_tokens(names: list[str], repeats: int, model: Path) -> Figures:
    figures: Figures = {name: [] for name in names}
    with running(names, model) as variants:
        for repeat in range(repeats):
            prompts = [[3 + repeat, 7 + problem, 11] for problem in range(PROBLEMS)]
            _take_turns(variants, figures, RANDOM_EPOCHS, prompts, SAMPLES, RANDOM_TOKENS)
    return figures


def _take_turns(
    variants: dict[str, Variant], figures: Figures, rounds: int, prompts: list[list[int]], samples: int, tokens: int
) -> None:
    for name in variants:
        figures[name].append([])
    for _ in range(rounds):
        for name, variant in variants.items():
            figures[name][-1].append(variant.complete(prompts, samples, tokens))
            print(name, json.dumps(figures[name][-1][-1]), flush=True)


# ------------------------------------------------------------ models and figures


def prepare_chain_sum(out: Path) -> None:
    command = [sys.executable, "recipes/prepare_chain_sum.py", "--out", str(out), "--target", "0.8"]
    subprocess.run([*command, "--max-steps", "2000"], cwd=ROOT, check=True, timeout=1800)


def prepare_random(out: Path, chain_sum_model: Path) -> None:
    """Weights so small that every token is about as likely as any other."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (out / "config.json").exists():
        return
    config = AutoConfig.from_pretrained(chain_sum_model)
    config.vocab_size, config.initializer_range = RANDOM_VOCABULARY, 0.002
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(chain_sum_model).save_pretrained(out)


def read_prompts(task: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    lines = (task / "train.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]


def rates(figures: Figures, name: str, first: int = 0) -> list[float]:
    """Tokens/s of every epoch from `first` on, of all repetitions."""
    return [each["tokens"] / each["seconds"] for repeat in figures[name] for each in repeat[first:]]


def ratio(figures: Figures, name: str, peer: str, first: int = 0) -> float:
    pairs = zip(rates(figures, name, first), rates(figures, peer, first), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def summary(figures: Figures, first: int = 0) -> dict[str, Any]:
    """Median tokens/s and their spread by variant, from epoch `first` on; and what was drafted."""
    out = {}
    for name in figures:
        measured = rates(figures, name, first)
        epochs = [each for repeat in figures[name] for each in repeat[first:]]
        rounds, drafted = (sum(each.get(field, 0) for each in epochs) for field in ("rounds", "drafted"))
        accepted, tokens = (sum(each.get(field, 0) for each in epochs) for field in ("accepted", "tokens"))
        out[name] = {
            "tokens_per_s": statistics.median(measured),
            "tokens_per_s_lowest": min(measured),
            "tokens_per_s_highest": max(measured),
            "tokens_per_epoch": tokens / len(epochs),
            "acceptance": accepted / drafted if drafted else None,
            "accepted_per_round": accepted / rounds if rounds else None,
            "propose_share": sum(e.get("propose_s", 0) for e in epochs) / sum(e["seconds"] for e in epochs),
        }
    return out


def bars(bulk: Figures, tail: Figures, random: Figures) -> list[Bar]:
    wanted = [
        ("bulk from the 2nd epoch, to no drafting", bulk, "none", 1, 1.3),
        ("bulk from the 2nd epoch, to suffix", bulk, "suffix", 1, 1.2),
        ("tail, to no drafting", tail, "none", 0, 2.5),
        ("tail, to suffix", tail, "suffix", 0, 1.15),
        ("random tokens, to no drafting", random, "none", 0, 0.97),
    ]
    return [
        Bar(name, ratio(figures, "ours", peer, first), bound, "at least")
        for name, figures, peer, first, bound in wanted
        if "ours" in figures and peer in figures
    ]


def choose(names: list[str]) -> list[str]:
    if "suffix" in names and importlib.util.find_spec("arctic_inference") is None:
        print("suffix is left out: pip install arctic-inference==0.3.0")
        names = [name for name in names if name != "suffix"]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--task", type=Path, default=ROOT / ".cache" / "speculation", help="chain-sum, made if absent")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.serve, args.model))
        return
    if args.json is None:
        parser.error("--json is required")
    prepare_chain_sum(args.task)
    names = choose(args.variants)
    bulk, tail, random = {}, {}, {}
    if "chain-sum" in args.parts:
        bulk, tail = chain_sum(names, args.repeats, args.task / "model", read_prompts(args.task))
    if "random" in args.parts:
        uniform = args.task.with_name(args.task.name + "_random")
        prepare_random(uniform, args.task / "model")
        random = random_tokens([name for name in names if name not in PEERS], args.repeats, uniform)
    figures = {
        "bulk_from_2nd_epoch": summary(bulk, 1),
        "bulk_1st_epoch": summary({n: [r[:1] for r in bulk[n]] for n in bulk}),
        "tail": summary(tail),
        "random": summary(random),
    }
    peers = {
        f"{area}, ours to {peer}": ratio(each, "ours", peer, first)
        for area, each, first in (("bulk", bulk, 1), ("tail", tail, 0), ("random", random, 0))
        for peer in each
        if "ours" in each and peer != "ours"
    }
    question = (__doc__ or "").splitlines()[0]
    write_result(
        args.json, question=question, figures=figures, peers=peers, bars=bars(bulk, tail, random), device=hardware()
    )


if __name__ == "__main__":
    main()
