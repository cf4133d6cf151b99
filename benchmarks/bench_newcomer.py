"""How long is a newcomer's way from a clone to a model of their own that answers, and does every command of it work?

    python benchmarks/bench_newcomer.py --json benchmarks/results/bench_newcomer.json

Takes the commands from `docs/guide/first-hour.md`, each block one, and runs them in a fresh clone of this repository,
its environment included. Stops at the first that fails. About a quarter of an hour on two cores, most of it pip and the
demo.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Bar, hardware, write_result

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "first-hour.md"
STEP = re.compile(r"\*\*(?P<name>[^*]+)\*\*[^`]*(?:`[^`]+`[^`]*)*?```sh\n(?P<command>.*?)```", re.DOTALL)
TIMEOUT_S = 1800.0
KEPT_LINES = 12


def steps(page: str) -> list[tuple[str, str]]:
    """(name, command) of every block: the name is the bold word before it."""
    return [(match["name"], match["command"]) for match in STEP.finditer(page)]


def run(command: str, clone: Path) -> tuple[float, str]:
    """Seconds, and the last lines that it printed. Raises: SystemExit where it fails."""
    began = time.perf_counter()
    ran = subprocess.run(
        ["bash", "-e", "-c", f"set -m\n{command}"],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = ran.stdout.strip().splitlines()[-KEPT_LINES:]
    if ran.returncode != 0:
        raise SystemExit("\n".join([f"ended with {ran.returncode}: {command}", *lines]))
    return time.perf_counter() - began, "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found = steps(PAGE.read_text())
    seconds: dict[str, float] = {}
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "echelon"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=60)
        for name, command in found:
            seconds[name], said[name] = run(command, clone)
            print(f"---- {name}: {seconds[name]:.0f} s\n{said[name]}", flush=True)
    figures = {"seconds": seconds, "total_s": sum(seconds.values())}
    bars = [Bar("commands of the page that worked", len(seconds), PAGE.read_text().count("```sh"), "at least")]
    question = (__doc__ or "").splitlines()[0]
    write_result(args.json, question=question, figures=figures, peers={}, bars=bars, device=hardware())
    return 0


if __name__ == "__main__":
    sys.exit(main())
