"""`python -m echelon.roles.step STOP_SIGNAL MODULE ARG...`: a role on a node of a Slurm job, below srun.

SIGTERM, SIGINT   tell the role to end, by STOP_SIGNAL
SIGUSR1           has it write its stacks; torchrun's agent, which would end of it, is not sent one
SIGUSR2           ends it at once
"""

import os
import signal
import sys
import time

from databus.address import address_towards
from databus.process import die_with_parent
from echelon.launch.slurm_step import END_NOW, IS_FIRST, NODE, STACKS
from echelon.processes import POLL_S, Child

FATAL_CODE = 128
LOOPBACK = "127.0.0.1"


def main() -> int:
    die_with_parent()
    stop, *arguments = sys.argv[1:]
    child = start(signal.Signals[stop], arguments)
    module = next(word for word in reversed(arguments) if word.startswith("echelon.roles."))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: child.terminate())
    signal.signal(STACKS, lambda *_: child.ask_for_stacks(module))
    signal.signal(END_NOW, lambda *_: child.kill())
    while (code := child.exit_code()) is None:
        time.sleep(POLL_S)
    return FATAL_CODE - code if code < 0 else code


def start(stop_signal: signal.Signals, arguments: list[str]) -> Child:
    """The role, with this process's environment and output."""
    here = address_towards(os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or LOOPBACK)
    is_first = str(os.environ.get("SLURM_NODEID", "0") == "0").lower()
    words = [word.replace(NODE, here).replace(IS_FIRST, is_first) for word in arguments]
    return Child("role", words, os.environ, None, stop_signal)


if __name__ == "__main__":
    sys.exit(main())
