import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from databus.messages import Status, WorkerStatus
from echelon.metrics import REQUIRED
from echelon.progress import Progress
from echelon.summary import duration, summary_table
from echelon.view import LiveView, PlainView, panel, sparkline, step_line


def make_row(step: int, **values: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(REQUIRED, 1.0)
    return row | {"step": step, "time_s": 2.0 * step, "reward/mean": step / 10} | values


def make_progress(num_rows: int) -> Progress:
    progress = Progress(recipe="my_recipe", run_dir="/runs/[1]", steps=10, max_staleness=2)
    rows = [make_row(step) for step in range(num_rows)]
    for version in range(0, num_rows, 2):
        rows[version]["eval/accuracy"] = 0.25 + version / 10
    progress.add(rows)
    worker = WorkerStatus(
        name="worker-0", version=3, leased_groups=1, running_sequences=8, tokens_per_s=9.0, silent_s=0.1
    )
    progress.status = Status(
        phase="running",
        step=num_rows,
        steps=10,
        version=4,
        learner_ready=True,
        workers=(worker,),
        running_groups=5,
        queued_groups=6,
        counts={"trained": 40, "stale": 1},
        last_progress_s=0.0,
    )
    return progress


def render(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_panel_says_that_the_disk_is_full() -> None:
    progress = make_progress(5)
    assert "nothing is acknowledged" not in render(panel(progress))
    assert progress.status is not None
    progress.status = msgspec.structs.replace(progress.status, disk_full="no room for [a]/000001.log")
    assert "nothing is acknowledged: no room for [a]/000001.log" in render(panel(progress))


def test_panel_shows_the_run() -> None:
    text = render(panel(make_progress(5)))
    for part in (
        "my_recipe",
        "/runs/[1]",
        "step 5/10",
        "ETA 10 s",
        "0.400",
        "0.250 → 0.650",
        "learner v4, worker-0 v3",
    ):
        assert part in text, part
    assert "trained 40  stale 1  filtered 0  failed 0  queued 6, running 5" in text


def with_status(**changes: Any) -> str:
    progress = make_progress(5)
    assert progress.status is not None
    progress.status = msgspec.structs.replace(progress.status, **changes)
    return render(panel(progress))


def make_workers(versions: list[int]) -> tuple[WorkerStatus, ...]:
    return tuple(
        WorkerStatus(
            name=f"worker-{index}",
            version=version,
            leased_groups=1,
            running_sequences=index,
            tokens_per_s=100.0 * (index + 1),
            silent_s=0.1,
        )
        for index, version in enumerate(versions)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requested": True}, "the learner waits for a batch"),
        ({"training_s": 3.0}, "the learner has had its batch for 3 s"),
        ({"training_s": 3.0, "workers": make_workers([4, 4])}, "for 3 s, 1 of 2 workers wait for it"),
        ({"learner_silent_s": 9.0}, "the learner has been silent for 9 s"),
        ({"oldest_lease_s": 61.0}, "6 of 8 groups are in, 5 running, the oldest for 1:01"),
        ({"queued_groups": 20, "running_groups": 0}, "8 of 8 groups are in, 0 running "),
    ],
)
def test_panel_says_who_waits_for_whom(changes: dict[str, Any], words: str) -> None:
    assert words in with_status(batch_groups=8, **changes)


def test_panel_counts_many_workers_by_version_and_names_the_slowest() -> None:
    text = with_status(workers=make_workers([4] * 47 + [3] * 3))
    assert "workers: 47 at v4, 3 at v3" in text
    assert "slowest worker-0, 100 tok/s (median 2,550)" in text


def test_panel_shows_who_was_sent_away_and_what_to_do() -> None:
    progress = make_progress(5)
    progress.advice = ["The learner waits [40 %] of the time" + " and more" * 9]
    assert progress.status is not None
    progress.status = msgspec.structs.replace(progress.status, drained={"worker-3": "slow"})
    text = render(panel(progress))
    assert "worker-3: slow" in text and "The learner waits [40 %] of the time" in text
    assert text.count("and more") == 9 and "next batch" in text  # nothing is cut off


def test_panel_shows_what_drafting_gives() -> None:
    text = render(panel(make_progress(5)))
    assert "drafts: 1.00 accepted a round, 100% of those drafted" in text


def test_panel_before_the_first_step() -> None:
    progress = Progress(recipe="r", run_dir="d", steps=10, max_staleness=2)
    progress.enter("starting vLLM")
    text = render(panel(progress))
    assert "step 0/10" in text
    assert "starting vLLM (0 s)" in text


def test_step_line_is_compact() -> None:
    progress = make_progress(3)
    line = step_line(progress, progress.rows[-1])
    assert line.startswith("step  2/10  reward 0.200  lag ≤1 (mean 1.0)")
    assert line.endswith("accuracy 0.450  ETA 14 s")
    assert step_line(progress, {"step": 10, "eval/accuracy": 0.5}) == "step 10/10  accuracy 0.500"


def test_summary_of_a_finished_run() -> None:
    progress = make_progress(10)
    progress.add([{"step": 10, "time_s": 20.0, "eval/accuracy": 0.75}])
    text = render(summary_table(progress))
    assert "10 of 10 steps" in text
    assert "0.250 → 0.750 (+0.500, greedy, held out, version 10)" in text
    assert "at most 1, mean 1.00 versions; allowed 2" in text
    assert "echelon export /runs/[1] OUT" in text


def test_summary_of_a_run_without_steps() -> None:
    text = render(summary_table(Progress(recipe="r", run_dir="d", steps=10, max_staleness=2)))
    assert "0 of 10 steps" in text
    assert "export" not in text


def test_eta_follows_the_last_steps() -> None:
    progress = make_progress(4)
    assert progress.eta_s() == pytest.approx(2.0 * 6)
    assert Progress(recipe="r", run_dir="d", steps=10, max_staleness=2).eta_s() is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3, 0.3]) == "▁▁"


def test_plain_view_writes_lines() -> None:
    console = Console(file=io.StringIO(), width=40)
    view = PlainView(console)
    progress = make_progress(2)
    progress.enter("training")
    view.phase(progress)
    view.rows(progress, progress.rows)
    view.note("a long note of more than forty columns is not folded at all, [brackets] or not")
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training"
    assert [line[:9] for line in lines[1:3]] == ["step  0/1", "step  1/1"]
    assert lines[3].endswith("[brackets] or not")


def test_live_view_leaves_only_notes_and_summary() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    view = LiveView(console)
    progress = make_progress(2)
    view.start()
    view.rows(progress, progress.rows)
    view.note("worker-0 was killed by SIGKILL")
    view.stop()
    view.summary(progress)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "worker-0 was killed" in text
    assert "2 of 10 steps" in text
