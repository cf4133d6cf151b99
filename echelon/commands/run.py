"""`echelon run`: from a recipe to a finished run."""

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from databus.journal import segments
from echelon.failures import RunFailed
from echelon.files import keep_rows_before
from echelon.interrupts import Interrupted
from echelon.launch.base import Launcher, Site
from echelon.launch.choose import make_launcher
from echelon.packages import package_root
from echelon.progress import Progress
from echelon.recipe import Recipe, load_recipe
from echelon.report.advice import Figures, advise
from echelon.run_folder import RunFolder, RunRecord
from echelon.settings import flatten
from echelon.shared_memory import shared_memory
from echelon.supervisor import Supervisor
from echelon.validate import check_machine
from echelon.view import make_view
from echelon.wandb_sink import WandbSink
from learner.checkpoint_folder import DamagedCheckpoint, latest_checkpoint, read_trainer_state, verify_sizes

RUNS = "runs"
MAX_ADVICE = 3
NO_SHARED_MEMORY = "set learner.memory_copy_every to 0, and weights.backend to bus"


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError for bad input, before anything has started."""
    if args.resume and not args.run_dir:
        raise ValueError("--resume needs --run-dir: the folder of the run to go on with")
    recipe = load_recipe(args.recipe, args.overrides)
    check_machine(recipe.config)
    if args.on == "slurm":
        return _submit(args, recipe)
    launcher = make_launcher(args.on, recipe.config)
    try:
        recipe = replace(recipe, config=launcher.placed(recipe.config))
        return _run(args, recipe, launcher)
    finally:
        launcher.close()


def _submit(args: argparse.Namespace, recipe: Recipe) -> int:
    from echelon.launch.slurm_job import submit

    folder = RunFolder(args.run_dir) if args.run_dir else _default_folder(recipe.name)
    for line in submit(recipe, folder, args.recipe, args.overrides, args.resume):
        sys.stdout.write(f"{line}\n")
    return 0


def _run(args: argparse.Namespace, recipe: Recipe, launcher: Launcher) -> int:
    folder = RunFolder(args.run_dir) if args.run_dir else _default_folder(recipe.name)
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"--run-dir {folder.path} is a file")
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.locked():
        record = folder.claim(recipe, args.resume)
        folder.make_keys(recipe.config.bus)
        first_step = _first_step(folder, recipe) if args.resume else 0
        if not segments(folder.journal):  # with a journal, every row that there is stays true
            for file in (folder.metrics_file, folder.samples_file):
                keep_rows_before(file, first_step)
        return _supervise(args, recipe, folder, record, first_step, launcher)


def _supervise(
    args: argparse.Namespace,
    recipe: Recipe,
    folder: RunFolder,
    record: RunRecord,
    first_step: int,
    launcher: Launcher,
) -> int:
    config = recipe.config
    progress = Progress(
        recipe=recipe.name,
        run_dir=_short(folder.path),
        steps=config.learner.steps,
        max_staleness=config.max_staleness,
        first_step=first_step,
        settings=flatten(msgspec.to_builtins(config)),
    )
    view = make_view()
    view.note(f"run folder {_short(folder.path)}" + (f", from step {first_step}" if args.resume else ""))
    wandb = WandbSink(config, folder, record.run_id)
    try:
        wanted = config.learner.memory_copy_every > 0 or config.weights.backend == "shm"
        with shared_memory(record.run_id, wanted, advice=NO_SHARED_MEMORY) as memory_dir:
            site = Site(folder, config, package_root(), memory_dir)
            code = Supervisor(site, launcher, progress, view, wandb).run()
        for line in advice_lines(progress):
            view.note(line)
        return code
    except Interrupted as interrupted:
        view.note(f"stopped at step {progress.steps_done} of {progress.steps}; {_how_to_go_on(args, folder)}")
        return interrupted.exit_code
    except RunFailed:
        if progress.rows:
            view.note(f"failed at step {progress.steps_done} of {progress.steps}; {_how_to_go_on(args, folder)}")
        raise


def advice_lines(progress: Progress) -> list[str]:
    """The weightiest advice; `echelon report` has all of it."""
    found = advise(Figures(progress.rows, progress.settings))
    return [f"advice: {advice.text}" for advice in found[:MAX_ADVICE]]


def _first_step(folder: RunFolder, recipe: Recipe) -> int:
    """Raises: ValueError where the run is finished, or its last checkpoint lacks a file; the learner reads them all."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    try:
        step = 0 if checkpoint is None else _checked_step(checkpoint)
    except DamagedCheckpoint as error:
        raise ValueError(error.advised()) from None
    steps = recipe.config.learner.steps
    if step >= steps:
        raise ValueError(
            f"the run in {folder.path} is finished after {step} steps: to go on, raise learner.steps, now {steps}"
        )
    return step


def _checked_step(checkpoint: Path) -> int:
    state = read_trainer_state(checkpoint)
    verify_sizes(checkpoint, state)
    return state.step


def _how_to_go_on(args: argparse.Namespace, folder: RunFolder) -> str:
    on = [] if args.on == "local" else ["--on", "slurm" if args.on == "allocation" else args.on]
    words = ["echelon", "run", args.recipe, *on, "--run-dir", _short(folder.path), "--resume", *args.overrides]
    checkpoint = latest_checkpoint(folder.checkpoints)
    where = f"from {checkpoint.name}" if checkpoint is not None else "from the start, as there is no checkpoint yet"
    return f"go on {where}: {shlex.join(words)}"


def _default_folder(recipe: str) -> RunFolder:
    """runs/RECIPE-TIME, with a number where that exists."""
    stem = Path(RUNS) / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return RunFolder(path)


def _short(path: Path) -> str:
    """Relative to where the user is, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
