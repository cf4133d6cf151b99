"""The command line: parses arguments, then imports the one command that was asked for.

Exit codes: 0 all went well, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

TRACEBACK_VARIABLE = "ECHELON_TRACEBACK"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(BAD_INPUT, f"echelon: {message} (see `{self.prog} --help`)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Whatever goes wrong is one line on stderr."""
    args = parse(arguments)
    os.environ["ECHELON_PID"] = str(os.getpid())  # databus.process.MAIN_PID_VARIABLE; not worth an import here
    try:
        from echelon.packages import package_root

        package_root()
        return importlib.import_module(f"echelon.commands.{args.command.replace('-', '_')}").execute(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `echelon watch RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return report(error)


def report(error: Exception) -> int:
    """Say what went wrong; ECHELON_TRACEBACK=1 shows where, too."""
    if os.environ.get(TRACEBACK_VARIABLE):
        import traceback

        traceback.print_exception(error)
    from echelon.errors import message_of

    sys.stderr.write(f"echelon: {message_of(error)}\n")
    return getattr(error, "exit_code", BAD_INPUT if isinstance(error, ValueError) else FAILED)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    # argparse gives all of `overrides` to the first stretch of words; later ones come back as extra.
    args, extra = parser.parse_known_args(arguments)
    takes_more = args.command == "run" and not any(word.startswith("-") for word in extra)
    if extra and not takes_more:
        parser.error(f"unknown argument {extra[0]!r} for `echelon {args.command}`")
    if args.command == "run":
        args.overrides += extra
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="echelon", description="Asynchronous reinforcement learning of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_worker(commands)
    _add_watch(commands)
    _add_export(commands)
    _add_audit(commands)
    _add_replay(commands)
    _add_report(commands)
    _add_bench_draft(commands)
    _add_keys(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[Parser]") -> None:
    run = commands.add_parser("run", help="train: start every role of a recipe, show progress, stop all cleanly")
    run.add_argument("recipe", metavar="RECIPE.py", help="a script with a function recipe() that returns a RunConfig")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change: learner.lr=1e-5")
    run.add_argument("--run-dir", metavar="DIR", help="where the run lies (default: runs/RECIPE-TIME)")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --run-dir")


def _add_worker(commands: "argparse._SubParsersAction[Parser]") -> None:
    worker = commands.add_parser("worker", help="join a run with another rollout worker, at any time")
    worker.add_argument("--join", required=True, metavar="DIR_OR_ADDRESS", help="the run's folder or its bus address")
    worker.add_argument("--name", help="name of the worker, unique in the run (default: worker-HOST-PID)")
    worker.add_argument("--keys", metavar="DIR", help="the run's keys, where --join is an address on tcp")
    worker.add_argument("--recipe", metavar="PATH", help="the recipe, where it defines the reward and lies elsewhere")
    worker.add_argument("--model", metavar="PATH", help="the initial model, where this machine has it elsewhere")


def _add_watch(commands: "argparse._SubParsersAction[Parser]") -> None:
    watch = commands.add_parser("watch", help="show the live view of a run")
    watch.add_argument("run", metavar="RUN_DIR_OR_ADDRESS", help="the run's folder, or its bus address")
    watch.add_argument("--keys", metavar="DIR", help="the run's keys, where it is an address on tcp")


def _add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    export = commands.add_parser("export", help="write a checkpoint as a folder that transformers and vLLM load")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out", metavar="OUT", help="a folder that is empty or does not exist")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the last one)")
    which.add_argument("--best", action="store_true", help="the checkpoint that did best in evaluation")


def _add_audit(commands: "argparse._SubParsersAction[Parser]") -> None:
    audit = commands.add_parser("audit", help="prove from a run's journal that it kept its promises")
    audit.add_argument("run_dir", metavar="RUN_DIR")
    audit.add_argument("--json", action="store_true", help="a JSON object with all figures and all violations")


def _add_replay(commands: "argparse._SubParsersAction[Parser]") -> None:
    replay = commands.add_parser("replay", help="take a run's steps again from its journal and compare their figures")
    replay.add_argument("run_dir", metavar="RUN_DIR")
    replay.add_argument("--steps", default=":", metavar="FIRST:STOP", help="as a slice (default: all there are)")
    replay.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        metavar="X",
        help="relative difference that passes (default: 0, the same bits, which a CPU gives)",
    )


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser("report", help="write what a run's folder says as one HTML file, with advice")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="a run; several are compared")
    report.add_argument("--out", metavar="FILE", help="where it is written (default: report.html in the first folder)")
    report.add_argument("--advice", action="store_true", help="only the advice, on the terminal")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def _add_bench_draft(commands: "argparse._SubParsersAction[Parser]") -> None:
    bench = commands.add_parser(
        "bench-draft", help="replay a run's completions through the drafter (draft.record=true)"
    )
    bench.add_argument("run_dir", metavar="RUN_DIR")
    policies = ("logarithmic", "marginal")
    bench.add_argument(
        "--policy", choices=policies, default=policies[0], help="marginal fits its latencies to the replay's own"
    )
    bench.add_argument("--max-tokens", type=_draft_tokens, help="most tokens of a draft (default: the run's)")


def _add_keys(commands: "argparse._SubParsersAction[Parser]") -> None:
    keys = commands.add_parser("keys", help="make the keys with which other machines may join a run")
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write a key pair for every role: broker, learner, worker, observer")
    new.add_argument("dir", metavar="DIR", help="a folder that is empty or does not exist")


def _draft_tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 64, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
