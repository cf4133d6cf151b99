"""How many completions a second does the bus carry from workers to batches, and does the broker's memory stay flat?

    python benchmarks/bench_bus.py --json benchmarks/results/bench_bus.json [--million]

Completions of 2,000 tokens in groups of 16, 18 KB each as arrays, go from a lean worker to the broker, into its journal
(one fdatasync a turn), are acknowledged, and come out in batches at a lean learner. The broker is the real one in a
process of its own; both peers share another. The codec is compared with others over the same kind of sockets. Then
small groups, 100,000 of them or a million, for the broker's memory. All but memory is measured `--repeats` times, in
turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import psutil
import zmq
from bus_broker import ADDRESS_FILE, KEYS
from bus_codecs import CODECS, measure_codec
from bus_load import MAX_MESSAGE_BYTES, PATIENCE_S, LeanLearner, Load, run_load
from common import Bar, hardware, write_result

from databus.config import BrokerConfig, BusConfig
from databus.keys import client_keys, new_keys
from databus.messages import Role
from databus.transport import make_socket, new_route

HERE = Path(__file__).resolve().parent
GROUP_SIZE, TOKENS = 16, 2000
BATCH_GROUPS, MAX_STALENESS = 64, 2
MIB = 1 << 20
DISK = HERE.parent / ".cache"
"""Where journals are written: not /tmp, which may be memory."""


def broker_config(address: str, load: Load) -> BrokerConfig:
    return BrokerConfig(
        run_id="bench",
        address=address,
        steps=load.steps,
        start_step=0,
        group_size=load.group_size,
        batch_groups=BATCH_GROUPS,
        max_staleness=MAX_STALENESS,
        stale_policy="drop",
        max_tokens=load.tokens,
        temperature=1.0,
        eval_every=0,
        eval_max_tokens=1,
        eval_timeout_s=1.0,
        max_reward_failures=3,
        bus=BusConfig(peer_timeout_s=PATIENCE_S),
    )


@contextmanager
def running_broker(address: str, load: Load, folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A broker in a process of its own, and its address; it ends with its run."""
    settings = msgspec.json.encode(broker_config(address, load)).decode()
    process = subprocess.Popen([sys.executable, str(HERE / "bus_broker.py"), str(folder), settings], cwd=HERE.parent)
    try:
        address_file, deadline = folder / ADDRESS_FILE, time.monotonic() + PATIENCE_S
        while not address_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the broker did not start: exit code {process.poll()}")
            time.sleep(0.02)
        yield psutil.Process(process.pid), address_file.read_text()
        if process.wait(PATIENCE_S) != 0:
            raise RuntimeError(f"the broker ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def drive(
    load: Load,
    encrypted: bool = False,
    each_batch: Callable[[psutil.Process, int], object] = lambda process, step: None,
) -> LeanLearner:
    """Run `load` through a new broker. Returns: the learner, which knows when its batches came."""
    with tempfile.TemporaryDirectory(dir=DISK) as name, zmq.Context() as context, ExitStack() as stack:
        folder = Path(name)
        if encrypted:
            new_keys(folder / KEYS)
        process, address = stack.enter_context(running_broker("tcp://127.0.0.1:*", load, folder))

        def connect(role: Role) -> zmq.Socket:
            keys = client_keys(folder / KEYS, role) if encrypted else None
            socket = make_socket(context, zmq.DEALER, MAX_MESSAGE_BYTES, keys)
            socket.setsockopt(zmq.IDENTITY, new_route("learner" if role == "learner" else "worker-0"))
            socket.connect(address)
            return socket

        return run_load(load, connect, lambda step: each_batch(process, step))


def completions_per_s(steps: int, encrypted: bool) -> float:
    load = Load(GROUP_SIZE, TOKENS, steps + 5, warm_up=5, credit=2 * BATCH_GROUPS)
    times = drive(load, encrypted).batch_times
    return steps * BATCH_GROUPS * GROUP_SIZE / (times[-1] - times[load.warm_up - 1])


def memory(num_groups: int) -> dict[str, float]:
    """The broker's resident memory over a run of small groups, MiB: after a tenth of it, the most later, at its end."""
    load = Load(2, 4, num_groups // BATCH_GROUPS, warm_up=num_groups // BATCH_GROUPS // 10, credit=2 * BATCH_GROUPS)
    resident: list[float] = []

    def look(process: psutil.Process, step: int) -> None:
        if step >= load.warm_up and step % 16 == 0:
            resident.append(process.memory_info().rss / MIB)

    times = drive(load, each_batch=look).batch_times
    return {
        "groups": load.steps * BATCH_GROUPS,
        "warm_mib": resident[0],
        "most_mib": max(resident),
        "last_mib": resident[-1],
        "groups_per_s": load.measured_steps * BATCH_GROUPS / (times[-1] - times[load.warm_up - 1]),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="batches of 64 groups that a repeat measures")
    parser.add_argument("--million", action="store_true", help="memory over a million groups, some minutes")
    args = parser.parse_args()
    DISK.mkdir(exist_ok=True)
    questions: dict[str, Callable[[], float]] = {
        "bus": lambda: completions_per_s(args.steps, encrypted=False),
        "bus with CURVE": lambda: completions_per_s(args.steps, encrypted=True),
    }
    for name in CODECS:
        num_groups = 60 if name == "msgspec lists" else 400
        questions[f"codec {name}"] = lambda name=name, num=num_groups: measure_codec(name, GROUP_SIZE, TOKENS, num)
    measured: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(args.repeats):
        for name, ask in questions.items():
            measured[name].append(ask())
            print(f"{name}: {measured[name][-1]:,.0f} completions/s", flush=True)
    rates = {name: spread(values) for name, values in measured.items()}
    flat = memory(1_000_000 if args.million else 100_000)
    print(flat)
    columns = rates["codec columns"]["median"]
    bars = [
        Bar("completions/s to a batch", rates["bus"]["median"], 13_000, "at least"),
        Bar("completions/s to a batch, with CURVE", rates["bus with CURVE"]["median"], 10_000, "at least"),
        Bar("codec over msgspec lists", columns / rates["codec msgspec lists"]["median"], 8, "at least"),
        Bar("codec over pickle 5", columns / rates["codec pickle 5"]["median"], 2, "at least"),
        Bar("memory gained after a tenth of the groups, MiB", flat["most_mib"] - flat["warm_mib"], 16, "at most"),
    ]
    write_result(
        args.json,
        question=(__doc__ or "").splitlines()[0],
        figures={"completions_per_s": {name: rates[name] for name in ("bus", "bus with CURVE")}, "memory": flat},
        peers={name: rates[f"codec {name}"] for name in CODECS},
        bars=bars,
        device=hardware(),
    )


if __name__ == "__main__":
    main()
