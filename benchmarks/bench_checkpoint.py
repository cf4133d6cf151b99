"""How long does a checkpoint hold training up, written beside it and written in its place?

    python benchmarks/bench_checkpoint.py --json benchmarks/results/bench_checkpoint.json

One rank trains a model of 52 million parameters, built from a configuration, on random tokens, and saves masters
and AdamW moments on a disk, synchronously and asynchronously in turn, and, asynchronously, in shared memory. Held up is
from the end of a step to the beginning of the next; what the writing takes from the steps beside it shows in their time
beside that of steps alone.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Bar, hardware, write_result

SHARED_MEMORY = Path("/dev/shm")
TOKENS = 128
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


class Training:
    """A sharded model, its optimizer, and a step on random tokens."""

    def __init__(self) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from learner.config import LearnerConfig
        from learner.model import ModelOptions, PolicyModel, shard
        from learner.optimizer import build_optimizer

        self.policy = shard(PolicyModel(Qwen3ForCausalLM(Qwen3Config(**MODEL)), 1.0, TOKENS), ModelOptions())
        self.optimizer, _ = build_optimizer(self.policy.parameters(), LearnerConfig())
        self.num_parameters = sum(parameter.numel() for parameter in self.policy.parameters())

    def step(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        ids = torch.randint(0, MODEL["vocab_size"], (1, TOKENS))
        positions = torch.arange(TOKENS)
        logprobs, _ = self.policy(ids, positions[None], positions[:-1], ids[0, 1:])
        (-logprobs.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        from learner.checkpoint import state_tensors

        return state_tensors(self.policy.causal_lm, self.optimizer)


class Saving:
    """Saves of one kind, each in a folder by itself."""

    def __init__(self, folder: Path, background: bool) -> None:
        from learner.checkpoint_saver import CheckpointSaver

        self._saver = CheckpointSaver(folder, keep=1, background=background, timeout_s=600.0)
        self._count = 0

    def save(self, training: Training) -> tuple[float, float, list[float]]:
        """(seconds that training is held up, until the checkpoint is complete, steps beside it)"""
        from learner.checkpoint_folder import TrainerState

        self._count += 1
        state = TrainerState(step=self._count, model="bench", world_size=1, position=None)
        began = time.perf_counter()
        self._saver.save(state, training.state())
        held = time.perf_counter() - began
        steps: list[float] = []
        while self._saver.is_writing:
            steps.append(training.step())
        self._saver.wait()
        return held, time.perf_counter() - began, steps

    def close(self) -> None:
        self._saver.close()


def measure(disk: Path, memory: Path, repeats: int) -> dict[str, Any]:
    training = Training()
    kinds = {
        "sync": Saving(disk / "sync", False),
        "async": Saving(disk / "async", True),
        "memory": Saving(memory, True),
    }
    figures: dict[str, Any] = {"num_parameters": training.num_parameters}
    figures |= {f"{kind}_{what}": [] for kind in kinds for what in ("held_ms", "complete_ms")}
    figures |= {"async_steps_beside_ms": [], "memory_steps_beside_ms": []}
    training.step()
    for saving in kinds.values():  # the first of a kind claims memory
        saving.save(training)
    figures["steps_alone_ms"] = [1e3 * training.step() for _ in range(repeats)]
    for _ in range(repeats):
        for kind, saving in kinds.items():
            held, complete, steps = saving.save(training)
            figures[f"{kind}_held_ms"].append(1e3 * held)
            figures[f"{kind}_complete_ms"].append(1e3 * complete)
            figures.get(f"{kind}_steps_beside_ms", []).extend(1e3 * step for step in steps)
        figures["steps_alone_ms"].append(1e3 * training.step())
    for saving in kinds.values():
        saving.close()
    return figures


def in_folders(run: Callable[[Path, Path], dict[str, Any]], disk: Path | None) -> dict[str, Any]:
    memory = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    try:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            return run(Path(folder), memory)
    finally:
        shutil.rmtree(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--disk", type=Path, help="a folder to write to (default: where temporary files go)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    from learner.run import process_group

    torch.set_num_threads(1)
    with process_group("cpu", timeout_s=600.0):
        figures = in_folders(lambda disk, memory: measure(disk, memory, args.repeats), args.disk)
    medians = {
        name: statistics.median(values) for name, values in figures.items() if isinstance(values, list) and values
    }
    for name, value in medians.items():
        print(f"{name:24} {value:8.1f}")
    write_result(
        args.json,
        question=(__doc__ or "").splitlines()[0],
        figures=figures | {f"median_{name}": value for name, value in medians.items()},
        peers={"synchronous, times as long": medians["sync_held_ms"] / medians["async_held_ms"]},
        bars=[Bar("async held up, of sync", medians["async_held_ms"] / medians["sync_held_ms"], 0.25, "at most")],
        device=hardware(),
    )


if __name__ == "__main__":
    main()
