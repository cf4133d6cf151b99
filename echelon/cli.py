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
    takes_more = args.command in ("run", "plan") and not any(word.startswith("-") for word in extra)
    if extra and not takes_more:
        parser.error(f"unknown argument {extra[0]!r} for `echelon {args.command}`")
    if takes_more:
        args.overrides += extra
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="echelon", description="Asynchronous reinforcement learning of language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_worker(commands)
    _add_serve(commands)
    _add_watch(commands)
    _add_export(commands)
    _add_audit(commands)
    _add_replay(commands)
    _add_report(commands)
    _add_plan(commands)
    _add_bench_draft(commands)
    _add_keys(commands)
    return parser


def _add_run(commands: "argparse._SubParsersAction[Parser]") -> None:
    run = commands.add_parser("run", help="train: start every role of a recipe, show progress, stop all cleanly")
    run.add_argument("recipe", metavar="RECIPE.py", help="a script with a function recipe() that returns a RunConfig")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change: learner.lr=1e-5")
    run.add_argument("--run-dir", metavar="DIR", help="where the run lies (default: runs/RECIPE-TIME)")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --run-dir")
    run.add_argument(
        "--on",
        choices=("local", "ray", "slurm", "allocation"),
        default="local",
        help="where roles run: this machine, a Ray cluster, a Slurm job, the job that this is in (default: local)",
    )


def _add_worker(commands: "argparse._SubParsersAction[Parser]") -> None:
    worker = commands.add_parser("worker", help="join a run with another rollout worker, at any time")
    worker.add_argument("--join", required=True, metavar="DIR_OR_ADDRESS", help="the run's folder or its bus address")
    worker.add_argument("--name", help="name of the worker, unique in the run (default: worker-HOST-PID)")
    worker.add_argument("--keys", metavar="DIR", help="the run's keys, where --join is an address on tcp")
    worker.add_argument("--recipe", metavar="PATH", help="the recipe, where it defines the reward and lies elsewhere")
    worker.add_argument("--model", metavar="PATH", help="the initial model, where this machine has it elsewhere")


def _add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible API, with rollouts and updates")
    serve.add_argument("model", metavar="MODEL", help="a folder or hub id")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--served-name", metavar="NAME", help="what requests call the model (default: MODEL)")
    serve.add_argument("--api-key-file", metavar="FILE", help="0600; needed where others can reach --host")
    serve.add_argument("--admin-key-file", metavar="FILE", help="0600; the key that may change weights")
    serve.add_argument("--drain-s", type=float, default=30.0, help="for requests that have begun, after SIGTERM")
    serve.add_argument("--follow", metavar="DIR_OR_ADDRESS", help="a run whose versions are served as they come")
    serve.add_argument("--keys", metavar="DIR", help="the run's keys, where --follow is an address on tcp")
    serve.add_argument("--reward", action="append", default=[], metavar="PATH.py:FUNCTION", help="requests may name it")
    serve.add_argument("--reward-config", metavar="FILE", help="settings of rewards, as JSON")
    serve.add_argument("--draft", choices=("off", "marginal", "logarithmic"), default="off", help="draft.policy")
    serve.add_argument("--draft-tokens", type=int, default=16, help="draft.max_tokens (default: 16)")
    _add_engine(serve)


def _add_engine(serve: Parser) -> None:
    serve.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    serve.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    serve.add_argument(
        "--context-tokens", type=int, help="prompt and completion (default: 2048, or what the model has)"
    )
    serve.add_argument("--max-sequences", type=int, default=256, help="at once (default: 256)")
    serve.add_argument("--kv-cache-gib", type=int, default=1, help="of a CPU engine (default: 1)")
    serve.add_argument("--gpu-memory-fraction", type=float, default=0.9, help="that vLLM may take (default: 0.9)")
    serve.add_argument("--graphs", action="store_true", help="compile and capture: starts later, steps are faster")
    serve.add_argument("--start-timeout-s", type=float, default=600.0)
    serve.add_argument("--seed", type=int, default=0)


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


def _add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    plan = commands.add_parser("plan", help="predict throughput, waits and staleness for other numbers of workers")
    plan.add_argument("recipe", metavar="RECIPE.py", help="as for `echelon run`")
    plan.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN_DIR | section.key=value",
        help="a run to fit to; settings; what to take for granted: assume.cores=2",
    )
    plan.add_argument("--from", dest="from_run", metavar="RUN_DIR", help="the run to fit to, by name")
    plan.add_argument("--workers", type=_counts, metavar="N,N", help="numbers of workers (default: 1,2,4)")
    plan.add_argument("--staleness", type=_bounds, metavar="N,N", help="values of max_staleness (default: 0,1,2,4)")
    plan.add_argument("--batch", type=_counts, metavar="N,N", help="values of batch_groups (default: the recipe's)")
    plan.add_argument("--steps", type=_steps, default=40, metavar="N", help="steps to simulate of each (default: 40)")
    plan.add_argument("--json", action="store_true", help="a JSON object with all figures")


def _counts(text: str, least: int = 1) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) >= least for word in words):
        raise argparse.ArgumentTypeError(f"expected whole numbers from {least}, with commas between them, got {text!r}")
    return list(dict.fromkeys(map(int, words)))


def _bounds(text: str) -> list[int]:
    return _counts(text, least=0)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"expected a whole number from 4, got {text!r}")
    return int(text)


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
