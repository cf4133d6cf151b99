"""The `python` tool: each call is a program of its own, run in the sandbox."""

import importlib
from importlib.util import find_spec
from typing import Any

from rewards.config import RewardConfig
from rollout.environments.tool_calls import ToolEnvironment, tool_schema

SANDBOX = "rewards.sandbox"


class PythonTool(ToolEnvironment):
    tools = (tool_schema("python", "Runs a Python program; tells what it prints.", "code", "The whole program."),)

    def __init__(self, reward: RewardConfig, limit_s: float) -> None:
        """Args: reward: whose sandbox it is. limit_s: for one program. Raises: ValueError, as `start_sandbox`."""
        self._sandbox = start_sandbox(reward)
        self._limit_s = limit_s
        super().__init__({"python": lambda code: run_python(self._sandbox, code, self._limit_s)})


def check_sandbox() -> None:
    """Raises: ValueError where there is none: generated code is run nowhere else."""
    if find_spec(SANDBOX) is None:
        raise ValueError("rollout.environment.name=python runs generated code, and this installation has no sandbox")


def start_sandbox(reward: RewardConfig) -> Any:
    """Raises: ValueError, one line, where there is none, or it does not start."""
    check_sandbox()
    settings = importlib.import_module("rewards.config").SandboxConfig
    sandbox = importlib.import_module(SANDBOX).Sandbox(getattr(reward, "sandbox", None) or settings())
    sandbox.start()
    return sandbox


def run_python(sandbox: Any, code: str, limit_s: float) -> str:
    """What a program has printed, and the last line of what went wrong.

    Raises: ValueError, one line for the model, where it ran too long; SandboxError.
    """
    outcome = sandbox.run(code, limit_s=limit_s)
    if outcome.late:
        raise ValueError(f"the program took longer than {limit_s:g} s")
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    if outcome.exit_code == 0:
        return printed
    wrong = outcome.stderr.decode(errors="replace").strip().splitlines()
    raise ValueError("\n".join(part for part in (printed, wrong[-1] if wrong else "the program was ended") if part))
