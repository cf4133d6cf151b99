from typing import Any

import msgspec
import pytest

from learner.checks import check_learner, names_function
from learner.config import AdvantageConfig, LearnerConfig, LossConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"betas": (0.9, 1.0)}, r"learner.betas is \[0.9, 1.0\]"),
        ({"attention": "flex_attention"}, "attention is flex_attention, which trains on cuda only: on a CPU use sdpa"),
        ({"attention": "flash_attention_2", "device": "cuda"}, "has no float32: set learner.dtype to bfloat16"),
        (
            {"attention": "flash_attention_2", "device": "cuda", "dtype": "bfloat16"},
            "the package flash-attn is not installed here: use sdpa",
        ),
        ({"offload": True}, "learner.offload is true, but learner.device is cpu"),
        ({"minibatches": 9}, "learner.minibatches is 9, but a batch has only batch_groups=8"),
        ({"loss": LossConfig(aggregation="fixed")}, "set learner.loss.fixed_tokens, usually to rollout.max_tokens"),
        ({"loss": LossConfig(dual_clip=1.2)}, r"dual_clip is 1.2: expected 0 \(none\), or above .*=1.28"),
        ({"loss": LossConfig(importance_low=2.0)}, "importance_low is 2 and importance_cap 2: low must be below cap"),
        ({"loss": LossConfig(kind="gspo")}, "kind is gspo, but against proximal=current its ratio is always 1: set"),
        ({"loss": LossConfig(kind="cispo", proximal="recomputed")}, "kind is cispo, but against proximal=recomputed"),
        (
            {"loss": LossConfig(kl_coef=0.1, kl_estimator="k1")},
            "kl_estimator is k1 in the loss, where its gradient is 0",
        ),
        (
            {"advantage": AdvantageConfig(estimator="ppo")},
            "learner.advantage.estimator is 'ppo': expected grpo, dr_grpo",
        ),
        ({"advantage": AdvantageConfig(overlong_cache_tokens=5)}, "overlong_cache_tokens is 5: allowed are 0 to .*=0"),
        ({"advantage": AdvantageConfig(estimator="gdpo", overlong_tokens=9)}, "set it to 0"),
        (
            {"advantage": AdvantageConfig(estimator="gdpo"), "loss": LossConfig(kl_coef=0.1, kl_in="reward")},
            "kl_in is reward, but gdpo",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        check_learner(msgspec.structs.replace(LearnerConfig(), **settings), batch_groups=8)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": LossConfig(kind="gspo", proximal="sampled")},
        {"loss": LossConfig(kind="cispo", proximal="recomputed"), "minibatches": 2},
        {"loss": LossConfig(kl_coef=0.1, kl_estimator="k1", kl_in="reward")},
        {"loss": LossConfig(aggregation="fixed", fixed_tokens=8, dual_clip=3.0)},
        {"advantage": AdvantageConfig(estimator="mine.py:function", overlong_tokens=9, overlong_cache_tokens=9)},
    ],
)
def test_what_can_work_is_not(settings: dict[str, Any]) -> None:
    check_learner(msgspec.structs.replace(LearnerConfig(), **settings), batch_groups=8)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LearnerConfig(compile=True)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    check_learner(config, batch_groups=8)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"learner.compile is true, but there is no C\+\+ compiler here"):
        check_learner(config, batch_groups=8)


def test_names_of_functions() -> None:
    assert names_function("mine.py:function")
    assert not names_function("reinforce++_baseline")
    with pytest.raises(ValueError, match=r"or PATH\.py:FUNCTION"):
        names_function("mine.txt:function")
