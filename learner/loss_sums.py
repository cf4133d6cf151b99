"""Sums over loss-bearing tokens by how old they are, and the metrics made of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from databus.staleness import LAG_BUCKETS
from learner.divergence import k3_divergence

FIELDS = (
    "tokens",
    "loss",
    "clipped_low",
    "clipped_high",
    "cut",
    "k3",
    "weight",
    "weight_squared",
    "entropy",
    "reference_kl",
)


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens in each lag bucket: float64 [6, 10], a row a bucket of `LAG_BUCKETS`, a column a field.

    Additive, so those of micro-batches and ranks can be added up. tokens: their number. loss: of the weighted policy
    losses. clipped_low, clipped_high: tokens whose ratio left the clip range. cut: tokens whose correction was cut or
    that it rejected. k3: of the estimates of KL(sampled ‖ now). weight, weight_squared: of the uncut importance weights
    w = exp(now - sampled). entropy: nats. reference_kl: of the estimates of KL(now ‖ reference).
    """

    values: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "LossSums":
        return cls(torch.zeros(len(LAG_BUCKETS), len(FIELDS), dtype=torch.float64, device=device))

    @classmethod
    @torch.no_grad()
    def of_tokens(cls, lags: Tensor, *, log_ratio: Tensor, **fields: Tensor) -> "LossSums":
        """Args: lags: int64 [K]. log_ratio: [K], now - sampled. fields: [K] each, those that do not follow from it."""
        weight = log_ratio.double().exp()
        columns = fields | {
            "tokens": torch.ones_like(weight),
            "k3": k3_divergence(log_ratio.double()),
            "weight": weight,
            "weight_squared": weight.square(),
        }
        values = torch.stack([columns[name].double() for name in FIELDS], dim=1)
        starts = torch.tensor(list(LAG_BUCKETS.values()), device=lags.device)
        buckets = torch.bucketize(lags, starts, right=True) - 1
        sums = cls.zeros(lags.device)
        sums.values.index_add_(0, buckets, values)
        return sums

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(self.values + other.values)

    def metrics(self, minibatches: int = 1) -> dict[str, float]:
        """Means over all loss-bearing tokens; of `BY_LAG` also over those of each bucket that has any.

        loss/policy is the batch's loss, a mean over its minibatches. mismatch/ess is (Σw)² / (n Σw²), in 0..1.
        """
        total = _Row(self.values.sum(dim=0).tolist())
        metrics = {
            "loss/policy": total["loss"] / minibatches,
            "loss/entropy": total.mean("entropy"),
            "loss/reference_kl": total.mean("reference_kl"),
            **{name: reckon(total) for name, reckon in BY_LAG.items()},
        }
        for bucket, values in zip(LAG_BUCKETS, self.values.tolist(), strict=True):
            row = _Row(values)
            if row["tokens"] > 0:
                metrics |= {f"{name}_lag{bucket}": reckon(row) for name, reckon in BY_LAG.items()}
        return metrics


class _Row:
    """One row of sums, by field."""

    def __init__(self, values: list[float]) -> None:
        self._values: dict[str, float] = dict(zip(FIELDS, values, strict=True))

    def __getitem__(self, field: str) -> float:
        return self._values[field]

    def mean(self, *fields: str) -> float:
        return sum(self[field] for field in fields) / max(1.0, self["tokens"])

    def effective_share(self) -> float:
        """Effective sample size of the importance weights as a share of the tokens; 1 where there are none."""
        squared = self["tokens"] * self["weight_squared"]
        return self["weight"] ** 2 / squared if squared > 0 else 1.0


BY_LAG: dict[str, Callable[[_Row], float]] = {
    "mismatch/kl": lambda row: row.mean("k3"),
    "mismatch/ess": _Row.effective_share,
    "loss/clip_fraction": lambda row: row.mean("clipped_low", "clipped_high"),
    "loss/clip_low_fraction": lambda row: row.mean("clipped_low"),
    "loss/clip_high_fraction": lambda row: row.mean("clipped_high"),
    "loss/importance_truncated_fraction": lambda row: row.mean("cut"),
}
"""Metrics that are also reckoned for each lag bucket, as NAME_lagBUCKET."""
