"""What the service counts, beside vLLM's own metrics, in Prometheus's words."""

from collections.abc import Iterator
from typing import Any

from rollout.engine.base import Engine
from rollout.service.doors import Doors
from rollout.service.rollouts import RolloutDesk
from rollout.service.scoring import Rewards
from rollout.service.weights import WeightDesk


class ServiceMetrics:
    """Read when they are asked for; nothing is counted twice."""

    def __init__(self, engine: Engine, doors: Doors, rollouts: RolloutDesk, rewards: Rewards, desk: WeightDesk) -> None:
        self._engine = engine
        self._doors = doors
        self._rollouts = rollouts
        self._rewards = rewards
        self._desk = desk

    def collect(self) -> Iterator[Any]:
        """For a `prometheus_client` registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        weights, counters = self._desk.weights(), self._rollouts.counters
        yield GaugeMetricFamily("echelon_weights_version", "Policy version that is served.", weights.version)
        yield CounterMetricFamily("echelon_weight_updates", "Versions applied.", weights.updates)
        yield CounterMetricFamily("echelon_weight_refusals", "Versions refused.", weights.refused)
        yield CounterMetricFamily("echelon_weight_pause_seconds", "Time without a token, of updates.", weights.pause_s)
        yield GaugeMetricFamily("echelon_requests_inside", "Requests being answered.", self._doors.inside)
        yield GaugeMetricFamily("echelon_draining", "1 once no more requests are taken.", self._doors.draining)
        refused = CounterMetricFamily("echelon_requests_refused", "Requests answered with an error.", labels=["status"])
        for status, number in self._doors.refused.items():
            refused.add_metric([str(status)], number)
        yield refused
        groups = CounterMetricFamily("echelon_rollout_groups", "Groups of /v1/rollouts.", labels=["outcome"])
        groups.add_metric(["done"], counters["groups"])
        groups.add_metric(["failed"], counters["failed_groups"])
        yield groups
        yield CounterMetricFamily("echelon_rollout_tokens", "Tokens of /v1/rollouts.", counters["tokens"])
        yield self._scoring(CounterMetricFamily("echelon_scoring", "Of each reward.", labels=["reward", "what"]))
        drafting = GaugeMetricFamily("echelon_drafting", "Counters of the drafter.", labels=["what"])
        for name, value in self._engine.stats().drafting.items():
            drafting.add_metric([name], value)
        yield drafting

    def _scoring(self, family: Any) -> Any:
        for labels, value in self._rewards.counters().items():
            family.add_metric(list(labels), value)
        return family
