"""APOLLO, through apollo-torch, for parameters that FSDP2 has sharded."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learner.beside_adamw import own_part, whole
from learner.config import ApolloConfig

NO_LIBRARY = (
    "learner.optimizer=apollo needs the package apollo-torch: pip install -e '.[apollo]' (its licence is CC BY-NC 4.0)"
)


class ShardedApollo(Optimizer):
    """The library's update of each matrix, on the whole of it, on every rank the same; one at a time.

    Moments are of the gradient's random projection, rank by the larger dimension, and every rank has all of them. By
    itself the library (apollo-torch 1.0.3) refuses DTensors; on shards its norms would depend on the number of ranks;
    and it keeps a projector in the optimizer's state, which a checkpoint of tensors cannot hold. Here it is made again
    where there is none.

    Source: Zhu et al., APOLLO (arXiv:2412.05270).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        config: ApolloConfig,
    ) -> None:
        """Raises: ValueError if there is no matrix, or the library is not installed."""
        try:
            from apollo_torch import APOLLOAdamW
            from apollo_torch.random_projector import GradientProjector, next_seed
        except ImportError as error:
            raise ValueError(NO_LIBRARY) from error
        super().__init__(matrices, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self._library = APOLLOAdamW([nn.Parameter(torch.empty(0))])
        self._library_group = {**self._library.defaults, **_library_settings(config)}
        self._new_projector, self._next_seed = GradientProjector, next_seed
        self._gap = config.update_every
        self._projectors: dict[Tensor, tuple[int, Any]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for first_seed, parameter in enumerate(group["params"], 1):
                if parameter.grad is not None:
                    self._update(parameter, first_seed, group)

    def _update(self, parameter: Tensor, first_seed: int, group: dict[str, Any]) -> None:
        matrix = nn.Parameter(whole(parameter.detach()).clone())
        matrix.grad = whole(parameter.grad)  # type: ignore[arg-type]
        state = self.state[parameter]
        step = int(state.get("step", 0))
        theirs = {**state, "step": step, "projector": self._projector(parameter, first_seed, step)}
        if not theirs.get("scaled_grad", 0):  # no norm yet that the next one could outgrow
            theirs.pop("scaled_grad", None)
        # The library looks at its group and state in every step, as all optimizers of torch do.
        self._library.param_groups = [{**self._library_group, **group, "params": [matrix]}]
        self._library.state = {matrix: theirs}  # type: ignore[assignment]
        self._library.step()
        state.update({name: theirs[name] for name in ("exp_avg", "exp_avg_sq", "scaled_grad")})
        state["step"] = torch.tensor(float(theirs["step"]))
        parameter.copy_(own_part(matrix.detach(), parameter))

    def _projector(self, parameter: Tensor, first_seed: int, step: int) -> Any:
        """As the library would have it at `step`: one seed follows from another, so the step says which."""
        number = step // self._gap
        known, projector = self._projectors.get(parameter, (None, None))
        if number != known or step % self._gap == 0:
            seed = first_seed
            for _ in range(number):
                seed = self._next_seed(seed)
            projector = self._new_projector(
                self._library_group["rank"],
                update_proj_gap=self._gap,
                proj_type=self._library_group["proj_type"],
                seed=seed,
            )
            self._projectors[parameter] = number, projector
        return projector


def _library_settings(config: ApolloConfig) -> dict[str, Any]:
    return {
        "rank": config.rank,
        "update_proj_gap": config.update_every,
        "scale": config.scale,
        "scale_type": config.scale_by,
        "proj": "random",
        "proj_type": "std",
    }
