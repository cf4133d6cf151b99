import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from databus.records import BatchCut, GroupCompleted, GroupLeased, GroupMoved, Record, StepTaken
from echelon.traces import GroupTracer

STEPS, BATCH_GROUPS = 3, 4


def spans_of(*records: Record) -> list[Any]:
    exporter = InMemorySpanExporter()
    tracer = GroupTracer(exporter, 1.0, "run-1")
    for record in records:
        tracer(record)
    tracer.close()
    return list(exporter.get_finished_spans())


def leased(group_id: str, time_s: float) -> GroupLeased:
    return GroupLeased(group_id=group_id, cursor=7, attempt=0, worker="worker-0", time_s=time_s, predicted_tokens=9)


def completed(group_id: str, time_s: float) -> GroupCompleted:
    return GroupCompleted(group_id=group_id, worker="worker-0", columns=(), time_s=time_s, generate_s=2.0, score_s=0.5)


def test_a_trained_group_from_lease_to_loss() -> None:
    spans = spans_of(
        leased("a", 100.0),
        completed("a", 103.0),
        BatchCut(step=4, group_ids=("a",), time_s=105.0),
        StepTaken(step=4, metrics={"loss/policy": 0.25}, time_s=106.0),
    )
    times = {span.name: (span.start_time / 1e9, span.end_time / 1e9) for span in spans}
    assert times == {
        "group": (100.0, 106.0),
        "generate": (100.5, 102.5),
        "score": (102.5, 103.0),
        "wait for a batch": (103.0, 105.0),
        "train": (105.0, 106.0),
        "step": (105.0, 106.0),
    }
    named = {span.name: span for span in spans}
    group, step, train = named["group"], named["step"], named["train"]
    assert {span.parent.span_id for span in spans if span.parent} == {group.context.span_id}
    assert (group.parent, step.parent) == (None, None)
    assert [link.context.span_id for link in train.links] == [step.context.span_id]
    assert group.attributes["echelon.worker"] == "worker-0" and group.attributes["echelon.state"] == "trained"
    assert step.attributes["echelon.loss/policy"] == 0.25


@pytest.mark.parametrize("state", ["stale", "filtered", "failed", "expired"])
def test_a_group_that_is_not_trained_ends_where_it_was_given_up(state: Any) -> None:
    moved = GroupMoved(group_id="a", state=state, reason="why", time_s=104.0)
    (group, *_) = [span for span in spans_of(leased("a", 100.0), moved) if span.name == "group"]
    assert (group.start_time, group.end_time) == (100e9, 104e9)
    assert group.attributes["echelon.state"] == state
    assert group.status.is_ok == (state != "failed")


def test_a_group_that_was_leased_before_the_broker_came_back() -> None:
    cut, taken = BatchCut(step=0, group_ids=("a", "b"), time_s=105.0), StepTaken(step=0, metrics={}, time_s=106.0)
    groups = [span for span in spans_of(completed("a", 103.0), cut, taken) if span.name == "group"]
    assert sorted(group.start_time for group in groups) == [103e9, 105e9]


def test_a_step_whose_batch_another_broker_cut_is_left_out() -> None:
    assert spans_of(StepTaken(step=0, metrics={}, time_s=106.0)) == []


class Collector(ThreadingHTTPServer):
    """Keeps what OTLP over HTTP brings."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        super().__init__(("127.0.0.1", 0), CollectorHandler)

    def spans(self) -> list[Any]:
        resources = [resource for request in self.requests for resource in request.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


class CollectorHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_run_sends_every_group_that_it_has_trained(
    write_recipe, start_run, collector: Collector, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}/v1/traces"
    run = start_run(write_recipe(tmp_path), tmp_path / "run", f"learner.steps={STEPS}", f"traces.endpoint={endpoint}")
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
    states = Counter(
        attribute.value.string_value
        for span in collector.spans()
        for attribute in span.attributes
        if span.name == "group" and attribute.key == "echelon.state"
    )
    assert states["trained"] == STEPS * BATCH_GROUPS
    names = Counter(span.name for span in collector.spans())
    assert names["step"] == STEPS and names["train"] == STEPS * BATCH_GROUPS
    assert names["generate"] == names["score"] >= STEPS * BATCH_GROUPS


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_no_run(write_recipe, start_run, tmp_path: Path) -> None:
    endpoint = "http://127.0.0.1:9/v1/traces"
    run = start_run(write_recipe(tmp_path), tmp_path / "run", "learner.steps=2", f"traces.endpoint={endpoint}")
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, ""), run.logs()
