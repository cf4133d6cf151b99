"""Muon for the matrices of decoder layers, AdamW for the rest, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(Muon):
    """torch's Muon for parameters that FSDP2 has sharded.

    Torch 2.13's own would orthogonalise a DTensor by matrix products of shards, whose partial sums in bfloat16 depend
    on the number of ranks. Here the momentum is sharded, and each matrix's update is made whole before that, on every
    rank the same; one at a time.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"])  # Nesterov's
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        direction = _zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.add_(_like(direction.to(parameter.dtype), parameter), alpha=-rate)


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of what every rank has whole, where the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


class MuonWithAdamW(Optimizer):
    """One optimizer for schedules and checkpoints: the first group is Muon's, the second AdamW's, if there is anything
    for it; beside adapters there is not.

    Muon's updates are scaled to the root mean square of AdamW's, so that one rate and one weight decay serve both.
    Source: Jordan et al., Muon (2024), through torch.optim.Muon; scaling: Liu et al. (arXiv:2502.16982).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Raises: ValueError if there is no matrix."""
        chosen = list(matrices)
        known = set(map(id, chosen))
        others = [parameter for parameter in parameters if id(parameter) not in known]
        self._parts: list[Optimizer] = [
            ShardedMuon(chosen, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Looked up each time: loading a state dict exchanges groups and state.
            part.param_groups, part.state = [group], self.state
            part.step()
