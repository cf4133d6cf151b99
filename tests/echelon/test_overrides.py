import pytest

from echelon.config import DataConfig, RunConfig
from echelon.overrides import apply_overrides
from rewards.config import RewardPart
from rollout.config import DropSolved, PassRateBand

CONFIG = RunConfig(model="m", data=DataConfig(train="t.jsonl"))


def error(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        apply_overrides(CONFIG, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_take_the_type_of_their_setting() -> None:
    changed = apply_overrides(
        CONFIG,
        [
            "learner.lr=5e-5",
            "max_staleness=0",
            "data.chat=true",
            "rollout.engine=small",
            "learner.betas=0.8,0.95",
            "learner.loss.clip_low=0.1",
            "model=1234",
            "data.prompt={a}={b}",
        ],
    )
    assert changed.learner.lr == 5e-5
    assert changed.max_staleness == 0
    assert changed.data.chat is True
    assert changed.rollout.engine == "small"
    assert changed.learner.betas == (0.8, 0.95)
    assert changed.learner.loss.clip_low == 0.1
    assert changed.model == "1234"
    assert changed.data.prompt == "{a}={b}"
    assert CONFIG.learner.lr == 1e-6


def test_the_last_one_wins() -> None:
    assert apply_overrides(CONFIG, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("learner.lrr=1", "learner.lr?"),
        ("lr=1", "learner.lr?"),
        ("max_stalenes=1", "max_staleness?"),
        ("rollout.steps=3", "learner.steps?"),
        ("lerner.lr=1", "learner.lr?"),
    ],
)
def test_unknown_setting_names_the_nearest(override: str, nearest: str) -> None:
    text = error(override)
    assert repr(override) in text
    assert f"did you mean {nearest}" in text


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p", "repetition_penalty"])
def test_sampling_that_biases_the_ratio_is_refused_with_the_reason(name: str) -> None:
    assert f"there is no {name}: tokens would be sampled from another distribution" in error(f"rollout.{name}=0.9")


def test_unknown_setting_names_what_is_allowed_there() -> None:
    text = error("wandb.xyz=1")
    assert "wandb has: mode, project, name, samples_every" in text
    assert "did you mean" not in text
    assert "max_staleness" in error("zzz=1")


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("learner.lr=abc", "a number above 0"),
        ("learner.lr=-1", "a number above 0"),
        ("learner.lr=nan", "a number above 0"),
        ("learner.lr=inf", "a number above 0"),
        ("learner.steps=0", "a whole number at least 1"),
        ("learner.steps=1.5", "a whole number at least 1"),
        ("group_size=1", "a whole number at least 2"),
        ("rollout.gpu_memory_fraction=1.5", "a number above 0 and at most 1"),
        ("rollout.engine=tgi", "small or vllm"),
        ("data.chat=yes", "true or false"),
        ("learner.betas=0.9", "2 values with commas between them, each a number"),
    ],
)
def test_bad_value_says_what_was_given_and_what_is_allowed(override: str, allowed: str) -> None:
    assert error(override) == f"{override}: expected {allowed}"


def test_word_without_equals_sign() -> None:
    assert "expected section.key=value" in error("learner.lr")


def test_section_is_not_a_setting() -> None:
    assert "names a section" in error("learner=1")
    assert "clip_low" in error("learner.loss=1")


def test_a_section_with_variants() -> None:
    chosen = apply_overrides(CONFIG, ["scheduling.curriculum.type=pass_rate_band", "scheduling.curriculum.low=0.2"])
    assert chosen.scheduling.curriculum == PassRateBand(low=0.2)
    again = apply_overrides(chosen, ["scheduling.curriculum.high=0.7"])
    assert again.scheduling.curriculum == PassRateBand(low=0.2, high=0.7)
    other = apply_overrides(again, ["scheduling.curriculum.type=drop_solved"])
    assert other.scheduling.curriculum == DropSolved()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("scheduling.curriculum.type=easy", ["expected drop_solved or learning_progress or none or pass_rate_band"]),
        ("scheduling.curriculum.low=0.2", ["low is not a setting of scheduling.curriculum.type=none", "it has none"]),
        ("scheduling.curriculum.lowest=0.2", ["unknown setting", "scheduling.curriculum has", "low"]),
        ("scheduling.curriculum=none", ["names a section", "type"]),
        ("scheduling.curriculum.high=2", ["above 0 and at most 1"]),
    ],
)
def test_variants_that_do_not_fit(override: str, words: list[str]) -> None:
    text = error(override)
    assert all(word in text for word in words), text


def test_parts_of_the_reward_are_json() -> None:
    text = 'reward.parts=[{"function": "math"}, {"function": "format", "weight": 0.1}]'
    parts = apply_overrides(CONFIG, [text]).reward.parts
    assert parts == (RewardPart(function="math"), RewardPart(function="format", weight=0.1))


@pytest.mark.parametrize(
    "text", ["math", '[{"weight": 1}]', '[{"function": "math", "wait": 1}]', '[{"function": 1}]', "{}"]
)
def test_malformed_parts_are_one_line(text: str) -> None:
    assert error(f"reward.parts={text}") == (
        f"reward.parts={text}: expected a list, as JSON, each of function (text), weight (a number), name (text)"
    )


def test_unknown_rewards_settings_are_one_line() -> None:
    assert "unknown setting 'reward.judge.modle'" in error("reward.judge.modle=x")
    assert "did you mean reward.judge.model?" in error("reward.judge.modle=x")
