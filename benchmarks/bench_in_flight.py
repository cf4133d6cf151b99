"""What does a new version cost an engine that is busy, by policy, and does it pay to put it off?

    python benchmarks/bench_in_flight.py --json benchmarks/results/bench_in_flight.json

One vLLM on the CPU with a random Qwen3 of 27 million parameters, always full of requests that share nothing. Versions
come one after the other, with all tensors changed or a few; the peer is the same engine without any. Beside it runs of
the demo's recipe with and without delayed updates (`--steps 0` leaves them out).
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from common import Bar, hardware, write_result
from demo_run import prepare, train

from databus.messages import Manifest, Sampling, TensorSpec
from rollout.config import RolloutConfig, UpdateConfig
from rollout.engine.base import GenerateRequest, Snapshot, UpdateReport
from rollout.engine.vllm_engine import VllmEngine

CONFIG = RolloutConfig(context_tokens=512, max_sequences=32)
POLICIES = ("none", "keep", "recompute", "drain")
"""`none`: no versions come."""
PROMPT_TOKENS, TOKENS = 32, (60, 180)
FEW = 4
"""Tensors that change where few do."""
PAUSE_RATIO = 1.5


def write_model(folder: Path, hidden: int, layers: int) -> None:
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0)
    model.save_pretrained(folder)


class Versions:
    """Made from one another: noise on some tensors."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._weights = {name: tensor.detach().clone() for name, tensor in causal_lm.named_parameters()}
        self._specs: dict[str, TensorSpec] = {}
        self._version = 0

    def next(self, tensors: int) -> Snapshot:
        """Args: tensors: how many have changed; 0: all."""
        names = sorted(self._weights)
        changed = random.Random(self._version).sample(names, tensors) if tensors else names
        self._version += 1
        fd, offset = os.memfd_create(f"bench-{self._version}"), 0
        for name, tensor in self._weights.items():
            if name in changed:
                tensor += 1e-3 * torch.randn(tensor.shape)
            data = tensor.numpy().data.cast("B")
            if name in changed or name not in self._specs:
                self._specs[name] = TensorSpec(
                    name=name,
                    dtype="float32",
                    shape=tuple(tensor.shape),
                    offset=offset,
                    num_bytes=data.nbytes,
                    xxh3=xxhash.xxh3_64_intdigest(data),
                )
            os.pwrite(fd, data, offset)
            offset += data.nbytes
        specs = tuple(self._specs[name] for name in self._weights)
        manifest = Manifest(version=self._version, num_bytes=offset, chunk_bytes=1 << 20, tensors=specs)
        return Snapshot(
            version=self._version,
            manifest=manifest,
            fd=fd,
            base_version=self._version - 1,
            changed=frozenset(changed),
        )


@dataclass
class Busy:
    """An engine that always has as many requests as it has room for."""

    engine: VllmEngine
    versions: Versions
    tokens: int = 0
    count: int = 0

    async def lane(self, until: float) -> None:
        """Counts the tokens that were generated before `until`, as far as they come by then."""
        draw = random.Random(self.count)
        while time.perf_counter() < until:
            self.count += 1
            prompt = tuple(draw.randrange(1, 4096) for _ in range(PROMPT_TOKENS))
            sampling = Sampling(max_tokens=draw.randrange(*TOKENS), temperature=1.0)
            request = GenerateRequest(group_id=f"b{self.count}", prompt_ids=prompt, group_size=1, sampling=sampling)
            (completion,) = await self.engine.generate(request)
            if time.perf_counter() < until:
                self.tokens += len(completion.token_ids)

    async def cell(self, policy: Any, tensors: int, seconds: float, every_s: float) -> tuple[float, list[UpdateReport]]:
        """(tokens/s, what the updates cost). Args: tensors: that change with each version; 0: all."""
        update = UpdateConfig() if policy == "none" else UpdateConfig(kv=policy)
        self.engine._config = msgspec.structs.replace(CONFIG, update=update)
        self.tokens, started = 0, time.perf_counter()
        lanes = [asyncio.ensure_future(self.lane(started + seconds)) for _ in range(CONFIG.max_sequences)]
        reports = []
        await asyncio.sleep(every_s / 2)
        while policy != "none" and time.perf_counter() < started + seconds - every_s:
            due = time.perf_counter() + every_s
            snapshot = await asyncio.to_thread(self.versions.next, tensors)
            reports.append(await self.engine.update(snapshot))
            snapshot.close()
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await asyncio.gather(*lanes)
        return self.tokens / seconds, reports


async def measure(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    engine = VllmEngine(CONFIG, str(model), seed=0, version=0)
    await engine.start()
    try:
        busy = Busy(engine, Versions(model))
        await busy.cell("keep", 0, 4 * args.every, args.every)  # warm, and the engine learns where tensors go
        cells: dict[tuple[str, int], list[tuple[float, list[UpdateReport]]]] = defaultdict(list)
        for _ in range(args.rounds):  # interleaved: whatever else this machine does meets all of them
            for policy in POLICIES:
                for tensors in (0, FEW) if policy != "none" else (0,):
                    cells[policy, tensors].append(await busy.cell(policy, tensors, args.seconds, args.every))
        return summary(cells)
    finally:
        await engine.close()


def summary(cells: dict[tuple[str, int], list[tuple[float, list[UpdateReport]]]]) -> dict[str, Any]:
    alone = statistics.median(rate for rate, _ in cells["none", 0])
    rows = {}
    for (policy, tensors), rounds in cells.items():
        rates = [rate for rate, _ in rounds]
        reports = [report for _, each in rounds for report in each]
        row: dict[str, Any] = {
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_spread": [min(rates), max(rates)],
            "tokens_lost_share": 1 - statistics.median(rates) / alone,
        }
        if reports:
            row |= {
                "updates": len(reports),
                "pause_s": median_of(reports, "pause_s"),
                "apply_s": median_of(reports, "load_s"),
                "pause_by_apply": statistics.median(each.pause_s / each.load_s for each in reports),
                "loaded_tensors": median_of(reports, "loaded_tensors"),
                "loaded_bytes": median_of(reports, "loaded_bytes"),
            }
        rows[f"{policy}, {tensors or 'all'} tensors" if policy != "none" else policy] = row
    return rows


def median_of(reports: Sequence[UpdateReport], name: str) -> float:
    return statistics.median(getattr(each, name) for each in reports)


def delayed(steps: int, seeds: int) -> dict[str, Any]:
    """Runs of the demo's recipe, with and without delay, one after the other for each seed."""
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    task = prepare(0)
    for seed in range(seeds):
        for delay in ("none", "longest"):
            with tempfile.TemporaryDirectory() as folder:
                overrides = (
                    f"learner.steps={steps}",
                    f"rollout.update.delay={delay}",
                    "eval.every=0",
                    "max_staleness=3",
                )
                metrics, _ = train(task, seed, Path(folder) / "run", *overrides)
            taken = [row for row in metrics if "loss/policy" in row][steps // 4 :]
            names = ("staleness/mean_versions", "rollout/tokens_per_s", "weights/delay_s", "learner/wait_s", "time_s")
            row = {name: statistics.mean(each[name] for each in taken) for name in names[:-1]}
            row["step_s"] = (taken[-1]["time_s"] - taken[0]["time_s"]) / (len(taken) - 1)
            rows[delay].append(row)
    return {
        delay: {name: statistics.median(row[name] for row in each) for name in each[0]} for delay, each in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="0: the runs alone")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a cell")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between versions")
    parser.add_argument("--steps", type=int, default=40, help="of a run with delayed updates; 0: no runs")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    if args.rounds:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), args.hidden, args.layers)
            rows = asyncio.run(measure(Path(folder), args))
    figures: dict[str, Any] = {"policies": rows} if rows else {}
    if args.steps:
        figures["delayed"] = delayed(args.steps, args.seeds)
    bars = [
        Bar(f"pause by apply time ({name})", row["pause_by_apply"], PAUSE_RATIO, "at most")
        for name, row in rows.items()
        if name.startswith("keep")
    ]
    write_result(
        args.json,
        question="What does a new version cost an engine that is busy, by policy, and does it pay to put it off?",
        figures=figures,
        peers={"no versions": rows.get("none")},
        bars=bars,
        device=hardware(),
    )


if __name__ == "__main__":
    main()
