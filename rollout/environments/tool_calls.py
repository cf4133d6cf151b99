"""Tool calls in the form that Qwen, Hermes and others were taught, and an environment that answers them.

Such as `<tool_call>{"name": "calculator", "arguments": {"expression": "3+5"}}</tool_call>`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from rollout.environments.base import Step

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
MAX_ERROR_CHARACTERS = 300

Tool = Callable[..., str]


class ToolError(Exception):
    """A call has failed; the model is told this very text."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` by name, all of them text."""

    name: str
    arguments: dict[str, str] = {}


class ToolEnvironment:
    """Answers every call of a turn with what its tool returns, a line or more each, in order.

    A turn without a call is the model's last. A call that is malformed, or whose tool raises, is answered with what is
    wrong, and counted.
    """

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        """Args: tools: name -> function of the call's arguments, by keyword."""
        self._tools = dict(tools)

    def reset(self, problem: dict[str, Any]) -> None:
        """Nothing lasts from one call to the next."""

    def step(self, state: None, turn: str) -> Step:
        calls = CALL.findall(turn)
        if not calls:
            return Step(done=True)
        answers = [self._answer(call) for call in calls]
        return Step(
            output="\n".join(text for text, _ in answers),
            tool_calls=len(answers),
            tool_errors=sum(failed for _, failed in answers),
        )

    def _answer(self, text: str) -> tuple[str, bool]:
        """(what the model is told, whether that is an error)."""
        try:
            call = msgspec.json.decode(text.strip(), type=Call)
            tool = self._tools.get(call.name)
            if tool is None:
                raise ValueError(f"no tool {call.name!r}; there is {', '.join(self._tools)}")
            return tool(**call.arguments), False
        except ToolError as error:
            return str(error), True
        except Exception as error:
            return error_text(error), True


def error_text(error: BaseException) -> str:
    """What the model is told of something that was raised, in one line."""
    text = " ".join(str(error).split()) or "no message"
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"error: {kind}{text}"[:MAX_ERROR_CHARACTERS]


def tool_schema(name: str, description: str, argument: str, argument_description: str) -> dict[str, Any]:
    """A tool with one argument of text, as chat templates take it."""
    properties = {argument: {"type": "string", "description": argument_description}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
