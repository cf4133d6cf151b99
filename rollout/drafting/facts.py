"""What the drafter must know of a request; rides to the engine's process in the request's own `extra_args`."""

from typing import Any

import msgspec
import xxhash
from msgspec import Struct

from databus.codec import Array

EXTRA_ARGUMENT = "echelon_draft"


class DraftFacts(Struct, frozen=True, kw_only=True):
    """Rollout worker -> proposer.

    problem, group: 64-bit keys; requests of one problem share what they have said, those of one group are siblings.
    predicted_tokens: expected length of the completion, 0 where unknown. history: (policy version, identity, token
    ids as little-endian int32) of earlier completions of the problem, newest last; see `GenerateRequest`.
    end_tokens: those that end the request.
    """

    problem: int
    group: int
    predicted_tokens: int = 0
    history: tuple[tuple[int, int, bytes], ...] = ()
    end_tokens: tuple[int, ...] = ()

    def extra_arguments(self) -> dict[str, Any]:
        """For vLLM's `SamplingParams(extra_args=...)`."""
        return {EXTRA_ARGUMENT: msgspec.msgpack.encode(self)}


def read_facts(extra_arguments: dict[str, Any] | None, prompt_ids: Array) -> DraftFacts:
    """Of a request; one that came without any is of a problem known by its prompt, and has no siblings.

    Args: prompt_ids: int32 [P]. Raises: ValueError.
    """
    encoded = (extra_arguments or {}).get(EXTRA_ARGUMENT)
    if encoded is None:
        return DraftFacts(problem=problem_key(prompt_ids), group=0)
    return msgspec.msgpack.decode(encoded, type=DraftFacts)


def problem_key(prompt_ids: Array) -> int:
    """int32 [P] -> 64 bits: the same in every process and run."""
    return xxhash.xxh3_64_intdigest(prompt_ids.tobytes())


def group_key(group_id: str) -> int:
    return xxhash.xxh3_64_intdigest(group_id.encode())
