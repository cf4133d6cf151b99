"""What does `echelon serve` cost beside `vllm serve`, and does it lose anything while its weights change?

    python benchmarks/bench_service.py --json benchmarks/results/bench_service.json [--soak-s 600]

Both serve the same model, in the same run, in turns, each alone on the machine; the load is vLLM's own
(`vllm bench serve`: random prompts, all at once up to --concurrency, every completion as long as it may be). Tokens a
second, without drafting; with it, ours beside vLLM's n-gram drafting. The soak: the same load on `echelon serve`
while another model's weights are loaded every five seconds, and groups are asked for whose versions are checked.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import Bar, hardware, write_result

from rollout.service.client import ServiceClient
from rollout.service.protocol import Prompt, ScoredGroup

ROOT = Path(__file__).resolve().parents[1]
VLLM = (sys.executable, str(ROOT / "benchmarks" / "vllm_cli.py"))
START_S, STOP_S, ROUND_S = 900.0, 120.0, 1800.0
OVERHEAD_BOUND = 0.03
UPDATE_EVERY_S = 5.0
ADMIN_KEY = "a-key-for-this-benchmark-alone"
CONTEXT_TOKENS, SEQUENCES = 512, 64
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


class Server:
    """One of the servers, as a process; answers once it is made."""

    def __init__(self, words: list[str], port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log = (folder / f"{port}.log").open("w")
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                said = Path(self._log.name).read_text()[-2000:]
                raise SystemExit(f"{' '.join(words)} did not start:\n{said}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5.0) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> int:
        """Its exit code."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()
        finally:
            self._log.close()


def echelon(model: Path, port: int, folder: Path, draft: str = "off") -> Server:
    key = folder / "admin.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_text(ADMIN_KEY)
    words = [sys.executable, "-m", "echelon", "serve", str(model), "--served-name", "model", "--port", str(port)]
    words += ["--context-tokens", str(CONTEXT_TOKENS), "--max-sequences", str(SEQUENCES), "--draft", draft]
    return Server([*words, "--admin-key-file", str(key)], port, folder)


def vllm(model: Path, port: int, folder: Path, *more: str) -> Server:
    words = [*VLLM, "serve", str(model), "--served-model-name", "model"]
    words += ["--port", str(port), "--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--enforce-eager"]
    return Server([*words, "--max-num-seqs", str(SEQUENCES), *more], port, folder)


def load(server: Server, model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One round of vLLM's load generator, as it saw it."""
    file = f"round-{time.monotonic_ns()}.json"
    words = [*VLLM, "bench", "serve", "--backend", "openai"]
    words += ["--base-url", server.url, "--model", "model", "--tokenizer", str(model), "--dataset-name", "random"]
    words += ["--random-input-len", "32", "--random-output-len", str(args.tokens), "--ignore-eos"]
    words += ["--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency), "--temperature", "1"]
    words += ["--disable-tqdm", "--save-result", "--result-dir", str(folder), "--result-filename", file]
    ran = subprocess.run(words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=ROUND_S)
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(words)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return json.loads((folder / file).read_text())


def compare(
    starts: dict[str, Callable[[], Server]], model: Path, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second of both servers, each alone on the machine: what waits takes part of two cores, too.

    One is started, warmed, measured for some rounds and stopped, then the other; each such pair gives a ratio of
    medians, whatever else the machine does over the minutes.
    """
    speeds: dict[str, list[list[float]]] = {name: [] for name in starts}
    for turn in range(args.repeats):
        for name in starts if turn % 2 == 0 else reversed(starts):
            server = starts[name]()
            try:
                load(server, model, folder, args)  # warm
                rounds = [load(server, model, folder, args)["output_throughput"] for _ in range(args.rounds)]
            finally:
                server.stop()
            speeds[name].append(rounds)
            print(f"{name}: {', '.join(f'{speed:,.0f}' for speed in rounds)} tokens/s", flush=True)
    medians = {name: [statistics.median(rounds) for rounds in each] for name, each in speeds.items()}
    ratios = [mine / other for mine, other in zip(medians["echelon"], medians["vllm"], strict=True)]
    return {
        "tokens_per_s": speeds,
        "median_tokens_per_s": {name: statistics.median(each) for name, each in medians.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
    }


def soak(model: Path, other: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What became of the requests while weights were loaded."""
    server = echelon(model, args.port, folder)
    over, counts = threading.Event(), Counter[str]()
    threads = [threading.Thread(target=_roll, args=(server, over, counts))]
    threads.append(threading.Thread(target=_update, args=(server, (other, model), over, counts)))
    for thread in threads:
        thread.start()
    ends, answers = time.monotonic() + args.soak_s, Counter[str]()
    try:
        while time.monotonic() < ends:
            seen = load(server, model, folder, args)
            answers["completed"] += seen["completed"]
            answers["lost"] += args.requests - seen["completed"]
            answers["tokens"] += seen["total_output_tokens"]
            answers["missing_tokens"] += args.requests * args.tokens - seen["total_output_tokens"]
    finally:
        over.set()
        for thread in threads:
            thread.join(ROUND_S)
        code = server.stop()
    return {"seconds": args.soak_s, "exit_code": code, **counts, **{f"load_{key}": n for key, n in answers.items()}}


def _roll(server: Server, over: threading.Event, counts: "Counter[str]") -> None:
    """Groups, and whether their versions are in order and those that were served while they were generated."""
    with ServiceClient(server.url, ADMIN_KEY) as client:
        while not over.is_set():
            before = client.weights().version
            try:
                groups = list(client.rollouts([Prompt(token_ids=[5, 6, 7])] * 4, max_tokens=200, group_size=4))
            except RuntimeError:
                counts["lost_groups"] += 4
                continue
            after = client.weights().version
            for group in groups:
                counts["groups"] += 1
                counts["lost_groups"] += not isinstance(group, ScoredGroup)
                if isinstance(group, ScoredGroup):
                    counts["wrong_versions"] += not _in_order(group, before, after)


def _in_order(group: ScoredGroup, before: int, after: int) -> bool:
    for completion in group.completions:
        versions = [span.version for span in completion.versions]
        stops = [0, *(span.stop for span in completion.versions)]
        whole = stops[-1] == len(completion.token_ids) and [s.start for s in completion.versions] == stops[:-1]
        if not whole or versions != sorted(set(versions)) or versions[0] < before or versions[-1] > after + 1:
            return False
    return True


def _update(server: Server, folders: tuple[Path, Path], over: threading.Event, counts: "Counter[str]") -> None:
    with ServiceClient(server.url, ADMIN_KEY) as client:
        while not over.wait(UPDATE_EVERY_S):
            try:
                client.load(str(folders[counts["updates"] % 2]))
                counts["updates"] += 1
            except RuntimeError:
                counts["failed_updates"] += 1


def other_weights(model: Path, folder: Path) -> Path:
    """A copy of the model with other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    made.save_pretrained(folder)
    return folder


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Bar]]:
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    for name, draft, more in (
        ("drafting off", "off", ()),
        ("drafting on", "logarithmic", ("--speculative-config", json.dumps(NGRAM))),
    ):
        if args.repeats == 0 or (draft != "off" and args.no_drafting):
            continue
        starts = {
            "echelon": partial(echelon, args.model, args.port, folder, draft),
            "vllm": partial(vllm, args.model, args.port + 1, folder, *more),
        }
        figures[name] = compare(starts, args.model, folder, args)
    if "drafting off" in figures:
        overhead = 1 / figures["drafting off"]["ratio"] - 1
        bars.append(Bar("overhead over vllm serve, drafting off", overhead, OVERHEAD_BOUND, "at most"))
    if args.soak_s > 0:
        figures["soak"] = seen = soak(args.model, other_weights(args.model, folder / "other"), folder, args)
        lost = sum(seen.get(key, 0) for key in ("load_lost", "lost_groups", "failed_updates"))
        bars.append(Bar("soak: requests lost", lost, 0, "at most"))
        bars.append(Bar("soak: tokens missing", seen["load_missing_tokens"], 0, "at most"))
        bars.append(Bar("soak: groups with wrong versions", seen.get("wrong_versions", 0), 0, "at most"))
    return figures, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/chain_sum/model")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of servers; 0: the soak alone")
    parser.add_argument("--rounds", type=int, default=3, help="of load, on each server")
    parser.add_argument("--no-drafting", action="store_true", help="leave out the rounds with drafting")
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--soak-s", type=float, default=600.0, help="0: none")
    parser.add_argument("--port", type=int, default=8730, help="and the next one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-service-") as folder:
        figures, bars = measure(args, Path(folder))
    write_result(
        args.json,
        question="What does echelon serve cost beside vllm serve, and does it lose anything while weights change?",
        figures=figures,
        peers={"vllm serve": "the same model and load, interleaved", "load": "vllm bench serve"},
        bars=bars,
        device=hardware(),
    )


if __name__ == "__main__":
    main()
