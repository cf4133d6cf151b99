"""The `python` tool: each call is a program of its own, run in the sandbox."""

import importlib
from importlib.util import find_spec
from typing import Any

from rewards.config import RewardConfig
from rollout.environments.tool_calls import ToolEnvironment, ToolError, tool_schema

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
    """What a program has printed.

    Raises: ToolError, with what it has printed until then, where it failed or ran too long; SandboxError.
    """
    outcome = sandbox.run(code, limit_s=limit_s)
    printed = outcome.stdout.decode(errors="replace").rstrip("\n")
    if outcome.exit_code == 0 and not outcome.late:
        return printed
    lines = outcome.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {outcome.exit_code}"]
    wrong = f"the program took longer than {limit_s:g} s" if outcome.late else lines[-1]
    raise ToolError("\n".join(part for part in (printed, f"error: {wrong}") if part))
