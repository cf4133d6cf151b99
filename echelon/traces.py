"""OpenTelemetry spans of groups, from lease to loss, made of what the broker writes down."""

from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, Record, StepTaken

EXPORT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_MS = 10_000
STEP_FIGURES = ("loss/policy", "learner/step_s", "learner/grad_norm", "mismatch/kl")


def otlp_exporter(endpoint: str) -> SpanExporter:
    """To a collector, over HTTP. One that cannot be reached costs the run nothing but lines in the broker's log."""
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)


@dataclass
class _Life:
    """What is known of a group that is not settled. Of one that comes late, after its lease has expired, and of those
    that were leased before the broker came back, the lease is not."""

    leased: GroupLeased | None = None
    completed: GroupCompleted | None = None


class GroupTracer:
    """A listener of the broker's records.

    A group is a trace: `group`, and below it `generate`, `score`, `wait for a batch` and `train`, as far as it came.
    The span `step` is a trace of its own, to which the `train` of its groups is linked. Spans are made when they are
    over, of the times that are written down anyhow, and sent by a thread.
    """

    def __init__(self, exporter: SpanExporter, share: float, run_id: str) -> None:
        """Args: share: of the groups that are traced, and of the steps."""
        resource = Resource.create({"service.name": "echelon", "echelon.run_id": run_id})
        self._provider = TracerProvider(sampler=TraceIdRatioBased(share), resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("echelon")
        self._groups: dict[str, _Life] = {}
        self._cuts: dict[int, BatchCut] = {}

    def __call__(self, record: Record) -> None:
        match record:
            case GroupLeased():
                self._groups[record.group_id] = _Life(leased=record)
            case GroupCompleted():
                self._groups.setdefault(record.group_id, _Life()).completed = record
            case GroupMoved():
                self._moved(record)
            case BatchCut():
                self._cuts[record.step] = record
            case StepTaken():
                self._stepped(record)

    def close(self) -> None:
        """Send what is left, but wait no longer than some seconds."""
        self._provider.force_flush(CLOSE_TIMEOUT_MS)
        self._provider.shutdown()

    def _moved(self, record: GroupMoved) -> None:
        life = self._groups.pop(record.group_id, None)
        if life is not None:
            group = self._group(record.group_id, life, record.time_s, {"echelon.state": record.state})
            if record.state == "failed":
                group.set_status(Status(StatusCode.ERROR, record.reason))
            group.end(_ns(record.time_s))

    def _stepped(self, record: StepTaken) -> None:
        cut = self._cuts.pop(record.step, None)
        if cut is None:  # by a broker that was killed
            return
        figures = {f"echelon.{name}": record.metrics[name] for name in STEP_FIGURES if name in record.metrics}
        attributes = {"echelon.step": record.step, "echelon.groups": len(cut.group_ids), **figures}
        step = self._tracer.start_span("step", attributes=attributes, start_time=_ns(cut.time_s))
        step.end(_ns(record.time_s))
        for group_id in cut.group_ids:
            life = self._groups.pop(group_id, _Life())
            self._trained(group_id, life, cut, record, step.get_span_context())

    def _trained(self, group_id: str, life: _Life, cut: BatchCut, taken: StepTaken, step: SpanContext) -> None:
        attributes = {"echelon.state": "trained", "echelon.step": cut.step}
        group = self._group(group_id, life, cut.time_s, attributes)
        if life.completed is not None:
            self._below(group, "wait for a batch", life.completed.time_s, cut.time_s)
        self._below(group, "train", cut.time_s, taken.time_s, links=[Link(step)])
        group.end(_ns(taken.time_s))

    def _group(self, group_id: str, life: _Life, known_s: float, attributes: Mapping[str, AttributeValue]) -> Span:
        """What the worker did of it is below it already. Args: known_s: when it began, if no record says that."""
        leased, completed = life.leased, life.completed
        first = next((each.time_s for each in (leased, completed) if each is not None), known_s)
        known: dict[str, AttributeValue] = {"echelon.group_id": group_id, **attributes}
        if leased is not None:
            known |= {"echelon.worker": leased.worker, "echelon.cursor": leased.cursor}
            known |= {"echelon.attempt": leased.attempt, "echelon.predicted_tokens": leased.predicted_tokens}
        group = self._tracer.start_span("group", attributes=known, start_time=_ns(first))
        if completed is not None and completed.generate_s:
            scored_from = completed.time_s - completed.score_s
            self._below(group, "generate", max(first, scored_from - completed.generate_s), scored_from)
            self._below(group, "score", scored_from, completed.time_s)
        return group

    def _below(self, group: Span, name: str, start_s: float, end_s: float, links: list[Link] | None = None) -> None:
        context = set_span_in_context(group)
        self._tracer.start_span(name, context, start_time=_ns(start_s), links=links).end(_ns(end_s))


def _ns(time_s: float) -> int:
    return int(time_s * 1e9)
