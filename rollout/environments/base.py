"""What an environment is to an episode. Imports nothing heavy: environments live in processes of their own."""

from typing import Any, Protocol

from msgspec import Struct


class Step(Struct, frozen=True, kw_only=True):
    """What comes of one turn of the model.

    output: what the model is told before its next turn; not said where `done`. parts: of the reward, added up over the
    episode. state: what the next `step` gets; anything that can be pickled. tool_calls, tool_errors: for the metrics.
    """

    output: str = ""
    done: bool = False
    parts: dict[str, float] = {}
    state: Any = None
    tool_calls: int = 0
    tool_errors: int = 0


class Environment(Protocol):
    """Keeps nothing of an episode between two calls: any of several processes may be asked for the next step.

    One that is to be described to the model by a chat template has a list `tools` of JSON schemas beside these two.
    """

    def reset(self, problem: dict[str, Any]) -> Any:
        """The state that an episode begins with. problem: the data set's row."""
        ...

    def step(self, state: Any, turn: str) -> Step:
        """Args: turn: what the model has said since the last step, without special tokens.

        Whatever it raises, the model is told, counted as a tool's error, and the episode goes on from `state`.
        """
        ...
