"""The weights in a model's folder, one at a time: what an adapter is added to."""

import json
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from rollout.engine.expected import ExpectedTensors


class BaseWeights:
    """Of a folder or hub id. Files are mapped, not read: what is not looked at takes no memory."""

    def __init__(self, model: str) -> None:
        """Raises: ValueError, in one line, where they are not there as safetensors, or one is missing."""
        from safetensors import safe_open

        self._model = model
        self.shapes = ExpectedTensors.of(model).shapes
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in weight_files(model):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = tuple(name for name in self.shapes if name in self._files)
        """Of a pair that is tied, those that are in the files."""

    def __getitem__(self, name: str) -> Tensor:
        """A copy, in the dtype of the file. Raises: ValueError, in one line, where there is none."""
        if name not in self._files:
            raise ValueError(f"model={self._model} has no tensor {name!r}")
        return self._files[name].get_tensor(name)

    def close(self) -> None:
        self._stack.close()


def weight_files(model: str) -> list[str]:
    """Paths. Raises: ValueError, in one line, where there are none in the format safetensors."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, cached_files

    def find(name: str) -> str | None:
        return cached_file(
            model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    whole = find(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ValueError(f"model={model} has no weights as safetensors, to which an adapter could be added")
    with open(index) as file:
        parts = sorted(set(json.load(file)["weight_map"].values()))
    return list(cached_files(model, parts) or [])
