"""The engine's model, against cases worked by hand."""

import math

import pytest

from echelon.plan.engine import EngineModel, EngineSpeed


def ends(engine: EngineModel) -> dict[str, float]:
    """When each group in the engine is done, if nothing comes to it."""
    done: dict[str, float] = {}
    while (end := engine.next_end()) < math.inf:
        done |= {group.group_id: end for group in engine.take_ended(end)}
    return done


def test_a_step_takes_longer_the_more_run() -> None:
    """Two sequences of 10 and 30 tokens: ten steps with both, twenty with one."""
    engine = EngineModel(EngineSpeed(1.0, 0.5), max_sequences=8, max_tokens=100)
    engine.add(0.0, "g", [10, 30], predicted_tokens=0)
    assert ends(engine) == {"g": pytest.approx(10 * 2.0 + 20 * 1.5)}
    assert engine.spent == (pytest.approx(30), pytest.approx(40))
    assert engine.generated_tokens == 40


def test_drafts_give_more_tokens_a_step() -> None:
    engine = EngineModel(EngineSpeed(1.0, 0.0, tokens_per_step=2.5), max_sequences=8, max_tokens=100)
    engine.add(0.0, "g", [10], predicted_tokens=0)
    assert ends(engine) == {"g": pytest.approx(4.0)}


def test_what_has_no_room_waits_and_the_longest_is_begun_first() -> None:
    engine = EngineModel(EngineSpeed(1.0, 0.0), max_sequences=4, max_tokens=100)
    engine.add(0.0, "first", [10, 20, 20, 20], predicted_tokens=10)
    engine.add(0.0, "short", [5], predicted_tokens=5)
    engine.add(0.0, "long", [50], predicted_tokens=50)
    assert engine.running == 4
    assert ends(engine) == {"first": 20.0, "short": 25.0, "long": 60.0}


def test_a_pause_and_a_slower_machine_take_their_time() -> None:
    engine = EngineModel(EngineSpeed(1.0, 0.0), max_sequences=4, max_tokens=100)
    engine.add(0.0, "g", [10], predicted_tokens=0)
    engine.set_factor(4.0, 0.0)
    assert engine.next_end() == math.inf
    engine.set_factor(9.0, 0.5)
    assert ends(engine) == {"g": pytest.approx(9.0 + 6 / 0.5)}


def test_tokens_belong_to_the_version_that_sampled_them() -> None:
    """Begun at version 0; after 4 tokens of each come version 1, after 10 version 2."""
    engine = EngineModel(EngineSpeed(1.0, 0.0), max_sequences=4, max_tokens=100)
    group = engine.add(0.0, "g", [3, 6, 12], predicted_tokens=0)
    for time, version in ((4.0, 1), (10.0, 2)):
        while engine.next_end() < time:
            engine.take_ended(engine.next_end())
        engine.switch(time, version)
    ends(engine)
    versions, tokens = engine.versions_of(group)
    assert dict(zip(versions.tolist(), tokens.tolist(), strict=True)) == {0: 3 + 4 + 4, 1: 2 + 6, 2: 2}
    later = engine.add(20.0, "later", [5], predicted_tokens=0)
    ends(engine)
    versions, tokens = engine.versions_of(later)
    assert (versions.tolist(), tokens.tolist()) == ([2], [5])


def test_what_is_dropped_makes_room() -> None:
    engine = EngineModel(EngineSpeed(1.0, 0.0), max_sequences=2, max_tokens=100)
    dropped = engine.add(0.0, "dropped", [50, 50], predicted_tokens=0)
    engine.add(0.0, "kept", [10, 10], predicted_tokens=0)
    engine.drop(5.0, dropped)
    assert ends(engine) == {"kept": pytest.approx(15.0)}
