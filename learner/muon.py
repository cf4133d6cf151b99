"""Muon for parameters that FSDP2 has sharded."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from learner.beside_adamw import own_part, whole


class ShardedMuon(Muon):
    """torch's Muon for matrices, sharded or not.

    Torch 2.13's own would orthogonalise a DTensor by matrix products of shards, whose partial sums in bfloat16 depend
    on the number of ranks. Here the momentum is sharded, and each matrix's update is made whole before that, on every
    rank the same; one at a time.

    Source: Jordan et al., Muon (2024), through torch.optim.Muon. With `adjust_lr_fn="match_rms_adamw"` updates have the
    root mean square of AdamW's, so that one rate and one weight decay serve both (Liu et al., arXiv:2502.16982).
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
        ahead = whole(grad.lerp(momentum, group["momentum"]))  # Nesterov's
        direction = _zeropower_via_newtonschulz(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
        parameter.add_(own_part(direction.to(parameter.dtype), parameter), alpha=-rate)
