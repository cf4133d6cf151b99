"""An optimizer for matrices with AdamW for the rest, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer


class BesideAdamW(Optimizer):
    """One optimizer for schedules and checkpoints: the first group is that of `first`, the second AdamW's, if there is
    anything for it; beside adapters there is not."""

    def __init__(
        self,
        first: Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Args: first: of one group. parameters: all of them; those that `first` has are its own."""
        known = {id(parameter) for group in first.param_groups for parameter in group["params"]}
        others = [parameter for parameter in parameters if id(parameter) not in known]
        self._parts: list[Optimizer] = [first]
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Looked up each time: loading a state dict exchanges groups and state.
            part.param_groups, part.state = [group], self.state
            part.step()


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank, where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of what every rank has whole, where the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
