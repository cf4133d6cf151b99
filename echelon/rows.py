"""Rows of a data set, from a JSONL or Parquet file, from the hub, or from a generator."""

import tempfile
from pathlib import Path
from typing import Any

from echelon.config import DataConfig
from echelon.errors import message_of
from echelon.generated_rows import generate, is_generated

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Rows = list[dict[str, Any]]


def load_rows(key: str, source: str, split: str, data: DataConfig, limit: int) -> Rows:
    """The first `limit` rows (0: all) of a source.

    Args: key: the setting that names the source, for messages.
    Raises: ValueError, in one line, where it cannot be read or is empty.
    """
    if is_generated(source):
        return generate(key, source, limit)

    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.suffix in BUILDERS:
            rows = _load_file(path)
        else:
            rows = datasets.load_dataset(source, data.subset or None, split=split)
    except Exception as error:  # the library raises whatever its many layers raise
        raise ValueError(f"{key}={source} cannot be read: {_reason(error)}") from error
    if len(rows) == 0:
        raise ValueError(f"{key}={source} has no rows")
    return rows.select(range(min(limit or len(rows), len(rows)))).to_list()


def _load_file(path: Path) -> Any:
    """A file is small and may change from run to run: nothing of it stays in the library's cache."""
    import datasets

    if path.stat().st_size == 0:  # datasets 5.2 raises about a missing schema instead
        return datasets.Dataset.from_list([])
    with tempfile.TemporaryDirectory(prefix="echelon-data-") as cache:
        builder = BUILDERS[path.suffix]
        return datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True)


def _reason(error: BaseException) -> str:
    """The innermost cause says it; the outer ones say that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return message_of(error)
