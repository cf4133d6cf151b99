"""Slurm's programs, as far as a run uses them, all on this machine: `install(folder)` writes them for a PATH.

sbatch runs the script of a job in the background, with the variables that a node of it has; with SLURM_RESTART_COUNT it
is Slurm that runs it again. srun runs its task once
for each node, in sessions of their own, passes signals on, and exits as Slurm's does: with a task's exit code, or 128
and the number of the signal that ended it.
"""

import sys
from pathlib import Path

SBATCH = """
import os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent
job = "4242"
script = pathlib.Path(sys.argv[1])
text = script.read_text()
(here / "job.sh").write_text(text)
nodes = int(re.search(r"--nodes=(\\d+)", text)[1])
output = re.search(r"--output=(\\S+)", text)[1].replace("%j", job)
names = [f"127.0.0.{index + 2}" for index in range(nodes)]
environment = os.environ | {
    "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": ",".join(names), "SLURM_JOB_NUM_NODES": str(nodes),
    "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1",
}
with open(output, "ab") as log:
    process = subprocess.Popen(
        ["bash", str(here / "job.sh")], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )
(here / "job.pid").write_text(str(process.pid))
print(f"Submitted batch job {job}")
"""
SCONTROL = """
import pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
elif sys.argv[1] == "requeue":
    (pathlib.Path(__file__).parent / "requeued").write_text(sys.argv[2])
else:
    sys.exit("unknown")
"""
SRUN = """
import os, pathlib, signal, subprocess, sys
alone = {"--exact", "--unbuffered", "--disable-status"}
words, options = sys.argv[1:], []
while words[0].startswith("--"):
    option = words.pop(0)
    options.append(option)
    if option not in alone and "=" not in option:
        options.append(words.pop(0))
with open(pathlib.Path(__file__).parent / "srun.log", "a") as log:
    print(*options, *words, file=log)
nodes = options[options.index("--nodelist") + 1].split(",")
assert len(nodes) == int(options[options.index("--nodes") + 1])
tasks = [
    subprocess.Popen(
        words, env=os.environ | {"SLURM_NODEID": str(index)}, stdin=subprocess.DEVNULL, start_new_session=True
    )
    for index, _ in enumerate(nodes)
]
def forward(number, _frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, forward)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
PROGRAMS = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}


def install(folder: Path) -> None:
    folder.mkdir()
    for name, source in PROGRAMS.items():
        (folder / name).write_text(f"#!{sys.executable}\n{source}")
        (folder / name).chmod(0o755)
