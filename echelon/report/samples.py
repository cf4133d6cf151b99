"""Some of a run's sampled completions, spread over its steps, token by token."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

MAX_STOPS = 20
"""Places of the file at which a step's samples are read: samples of a long run have gigabytes."""
MAX_TOKENS = 2000
"""Of one completion that are shown."""


@dataclass(frozen=True)
class SampledText:
    """tokens: text of each. versions, logprobs: of each; None where the run did not record them. score: as
    `echelon.metrics.sample_rows`; None likewise. total: tokens of the completion, of which `tokens` are the first.
    """

    step: int
    prompt: str
    reward: float
    truncated: bool
    tokens: tuple[str, ...]
    total: int
    versions: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    score: float | None


def read_samples(file: Path, tokenizer_file: Path, max_stops: int = MAX_STOPS) -> list[SampledText]:
    """Whole steps, evenly spread over the file. Raises: MsgspecError, KeyError for other rows; OSError."""
    if not file.exists():
        return []
    texts = _Texts(tokenizer_file)
    with file.open("rb") as source:
        rows = {found[0]["step"]: found for found in _stops(source, max_stops)}
    return [_sampled(row, texts) for step in sorted(rows) for row in rows[step]]


def _stops(source: BinaryIO, count: int) -> Iterator[list[dict[str, Any]]]:
    size = os.fstat(source.fileno()).st_size
    for index in range(count):
        rows = _step_behind(source, size * index // count)
        if rows:
            yield rows


def _step_behind(source: BinaryIO, offset: int) -> list[dict[str, Any]]:
    """The rows of the first step that begins at an offset or behind it."""
    source.seek(offset)
    if offset > 0:
        source.readline()
    row = _row(source)
    if offset > 0 and row is not None:  # it may be in the middle of its step
        row = _next_step(source, row["step"])
    if row is None:
        return []
    rows = [row]
    while (row := _row(source)) is not None and row["step"] == rows[0]["step"]:
        rows.append(row)
    return rows


def _next_step(source: BinaryIO, step: int) -> dict[str, Any] | None:
    while (row := _row(source)) is not None and row["step"] == step:
        pass
    return row


def _row(source: BinaryIO) -> dict[str, Any] | None:
    line = source.readline()
    return msgspec.json.decode(line, type=dict[str, Any]) if line.endswith(b"\n") else None


def _sampled(row: dict[str, Any], texts: "_Texts") -> SampledText:
    ids = row["token_ids"][:MAX_TOKENS]
    runs, logprobs = row.get("version_runs"), row.get("logprobs")
    versions = None if runs is None else tuple(version for version, count in runs for _ in range(count))[: len(ids)]
    return SampledText(
        step=row["step"],
        prompt=row["prompt"],
        reward=row["reward"],
        truncated=row["truncated"],
        tokens=tuple(texts.of(ids)),
        total=len(row["token_ids"]),
        versions=versions,
        logprobs=None if logprobs is None else tuple(logprobs[: len(ids)]),
        score=row.get("score"),
    )


class _Texts:
    """Texts of tokens; their numbers where the run's tokenizer cannot be read."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception:  # the library raises `Exception` itself
            self._tokenizer = None

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """A character that several tokens make up stands with the last of them."""
        if self._tokenizer is None:
            return [f"{token_id} " for token_id in token_ids]
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token_id) or "" for token_id in token_ids]
