"""What the broker is composed with: where prompts come from, what keeps a group out, where figures and groups go."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from databus.groups import Group


class Prompt(NamedTuple):
    """prompt: its text. prompt_ids: its token ids. problem: the data set's row as JSON."""

    prompt: str
    prompt_ids: tuple[int, ...]
    problem: bytes


class PromptSource(Protocol):
    def get(self, cursor: int) -> Prompt:
        """The prompt at a cursor, which counts prompts over all epochs; the same one every time it is asked."""
        ...


class GroupFilter(Protocol):
    def keep(self, group: Group) -> bool:
        """False for a group that is not worth training on; another prompt takes its place."""
        ...


class GroupRecorder(Protocol):
    def record(self, cursor: int, group_id: str, group: Group) -> None:
        """Take a completed training group, whatever becomes of it; groups come in the order of their completion."""
        ...


class SampledGroup(NamedTuple):
    """One group of a trained batch, for people to look at."""

    prompt: str
    group: Group


class MetricsSink(Protocol):
    def write(self, row: Mapping[str, float]) -> None:
        """Take the row of one step; rows come in the order of steps."""
        ...

    def samples(self, step: int, groups: Sequence[SampledGroup]) -> None:
        """Take a few groups of the batch that step `step` trained."""
        ...

    def rows_from(self, first: int) -> Sequence[str]:
        """Rows from number `first` on, as lines of JSON, of which there may be more than are returned."""
        ...
