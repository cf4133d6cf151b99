"""A transformers model's weights by the names of a checkpoint, to be read and overwritten in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion


class ServedTensors:
    """What transformers keeps in one tensor may be several in a checkpoint: a mixture's experts are."""

    def __init__(self, model: Any) -> None:
        self._places: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, tensor in model.state_dict().items():
            self._places |= {part: (tensor, where) for part, where in _places(model, name, tensor).items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies, of the stored shapes."""
        return {name: self._read(*self._places[name]) for name in names}

    @torch.no_grad()
    def overwrite(self, new: Mapping[str, Tensor]) -> None:
        for name, tensor in new.items():
            served, where = self._places[name]
            if where is None:
                served.copy_(tensor)
            else:
                served.view(-1)[where] = tensor.to(served)

    @staticmethod
    def _read(served: Tensor, where: Tensor | None) -> Tensor:
        return served.clone() if where is None else served.view(-1)[where]


def _places(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor | None]:
    """Of each part that a tensor is stored as: where its elements lie in the tensor; None: it is the tensor itself.

    A checkpoint only splits and turns tensors, so element numbers go where elements go.
    """
    if list(revert_weight_conversion(model, {name: tensor.to("meta")})) == [name]:
        return {name: None}
    numbers = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    return dict(revert_weight_conversion(model, {name: numbers}))
