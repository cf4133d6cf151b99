import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.leaving import Durations, nearly_done


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e4)), st.floats(0, 1e4), st.floats(0, 100))
def test_what_is_nearly_done_is_what_has_little_to_go(ages: dict[str, float], usual: float, within_s: float) -> None:
    kept = nearly_done(ages, usual, within_s)
    assert kept == {name for name, age in ages.items() if usual - age <= within_s}
    oldest = max(ages, key=lambda name: ages[name], default=None)
    assert not kept or oldest in kept


def test_all_are_kept_while_nothing_is_known() -> None:
    assert nearly_done({"a": 0.0, "b": 9.0}, None, 1.0) == {"a", "b"}


def test_durations_are_those_of_completed_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    durations = Durations()
    for group_id in ("a", "b", "c"):
        durations.begin(group_id)
    assert durations.usual() is None
    now = 4.0
    durations.end("a", completed=True)
    now = 5.0
    durations.end("b", completed=False)
    durations.end("never begun", completed=True)
    assert durations.usual() == 4.0
    assert durations.ages() == {"c": 5.0}
