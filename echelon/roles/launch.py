"""`python -m echelon.roles.launch MODULE ...`: become `python -m MODULE ...`, tied to the parent's life.

For programs that are not ours, such as torchrun's agent and, after `--program`, Slurm's srun: what the kernel was asked
for survives the exec.
"""

import os
import sys

from databus.process import die_with_parent


def main() -> None:
    die_with_parent()
    if sys.argv[1] == "--program":
        os.execv(sys.argv[2], sys.argv[2:])
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])


if __name__ == "__main__":
    main()
