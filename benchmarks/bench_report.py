"""How long does the report of a long run take to build, how large is it, and how fast does a browser open it?

    python benchmarks/bench_report.py --json benchmarks/results/bench_report.json

A synthetic run (`report_run.py`) of 10,000 steps and 50 workers with 16 groups of 8 a batch, in the real formats: the
journal in whole, rows, samples. Its groups are short, so that it fits a small disk: what a report does is a matter of
records, not of tokens. `echelon report` is a process of its own; beside its wall time stands its processor time, which
other work on the machine does not change. The browser is headless Chromium, where there is one: time until the page is
loaded and drawn, and what it says on its console.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Bar, hardware, write_result
from report_run import num_bytes, write_run

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 600.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


def build(run_dir: Path, out: Path) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, "-m", "echelon", "report", str(run_dir), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall_s": wall,
        "processor_s": processor,
        "bytes": out.stat().st_size,
        "memory_bytes": after.ru_maxrss << 10,
    }


def open_in_browser(browser: str, page: Path, folder: Path) -> dict[str, Any]:
    """An empty page first: starting the browser is not the report's doing."""
    empty = folder / "empty.html"
    empty.write_text('<!doctype html><title>empty</title><link rel="icon" href="data:,">')
    empty_s, _ = _screenshot(browser, empty, folder)
    page_s, said = _screenshot(browser, page, folder)
    return {"empty_s": empty_s, "page_s": page_s, "open_s": page_s - empty_s, "console": said}


def _screenshot(browser: str, page: Path, folder: Path) -> tuple[float, list[str]]:
    """(seconds, what the page said on its console)."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={folder / 'page.png'}"]
        started = time.perf_counter()
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S)
        seconds = time.perf_counter() - started
    done.check_returncode()
    return seconds, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="mean length of a completion")
    parser.add_argument("--keep", type=Path, help="a folder that does not exist, in which run and page are left")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        run = write_run(folder / "run", args.steps, args.workers, args.tokens)
        page = folder / "report.html"
        figures: dict[str, Any] = {"steps": args.steps, "workers": args.workers, "run_bytes": num_bytes(run.path)}
        figures |= build(run.path, page)
        bars = [
            Bar("seconds to build the report", figures["wall_s"], 20.0, "at most"),
            Bar("megabytes of the report", figures["bytes"] / 1e6, 10.0, "at most"),
        ]
        browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        if browser is None:
            print("no Chromium on this machine: the page was not opened")
        else:
            figures |= open_in_browser(browser, page, folder)
            bars.append(Bar("seconds that the page adds to opening an empty one", figures["open_s"], 3.0, "at most"))
            bars.append(Bar("lines on the console", len(figures["console"]), 0, "at most"))
    question = "How long does the report of a long run take to build and to open?"
    write_result(args.json, question=question, figures=figures, peers={}, bars=bars, device=hardware())


if __name__ == "__main__":
    main()
