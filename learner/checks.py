"""Checks across the learner's settings. Imports neither torch nor anything heavy."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

from learner.config import LearnerConfig, LossConfig

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "lite_ppo", "gdpo", "none")
ADVANTAGE_SETTING = "learner.advantage.estimator"
COMPILERS = ("g++", "clang++", "c++")
RATIO_KINDS = ("gspo", "cispo", "aipo")
"""Losses that are defined by their ratio: where it is always 1 they are `reinforce` under another name."""


def check_learner(config: LearnerConfig, batch_groups: int) -> None:
    """Raises: ValueError, in one line naming the settings to change, for the first thing that cannot work."""
    names_function(config.advantage.estimator)
    for error in (
        *_wrong_settings(config, batch_groups),
        *_wrong_loss(config.loss, config.minibatches),
        *_not_to_be_had(config),
    ):
        raise ValueError(error)


def names_function(estimator: str) -> bool:
    """Does the estimator name a function of the user's? Raises: ValueError if it names nothing that there is."""
    path, colon, _ = estimator.rpartition(":")
    if estimator not in ESTIMATORS and not (colon and path.endswith(".py")):
        raise ValueError(f"{ADVANTAGE_SETTING} is {estimator!r}: expected {', '.join(ESTIMATORS)} or PATH.py:FUNCTION")
    return estimator not in ESTIMATORS


def _wrong_settings(config: LearnerConfig, batch_groups: int) -> Iterator[str]:
    if not all(0 <= beta < 1 for beta in config.betas):
        yield f"learner.betas is {list(config.betas)}: both must be at least 0 and below 1"
    if config.ranks % config.nodes:
        yield f"learner.ranks is {config.ranks} and learner.nodes {config.nodes}: each node has as many ranks"
    if config.minibatches > batch_groups:
        yield f"learner.minibatches is {config.minibatches}, but a batch has only batch_groups={batch_groups} groups"
    estimator = config.advantage.estimator
    advantage = config.advantage
    if advantage.overlong_cache_tokens > advantage.overlong_tokens:
        yield (
            f"learner.advantage.overlong_cache_tokens is {advantage.overlong_cache_tokens}: allowed are 0 to "
            f"learner.advantage.overlong_tokens={advantage.overlong_tokens}"
        )
    if estimator == "gdpo" and advantage.overlong_tokens > 0:
        yield "learner.advantage.overlong_tokens is set, but gdpo normalises parts of rewards, not rewards: set it to 0"
    if estimator == "gdpo" and config.loss.kl_coef > 0 and config.loss.kl_in == "reward":
        yield "learner.loss.kl_in is reward, but gdpo normalises parts of rewards, not rewards: set it to loss"


def _not_to_be_had(config: LearnerConfig) -> Iterator[str]:
    """What this device, or this machine, does not have."""
    if config.attention != "sdpa" and config.device == "cpu":
        # torch 2.13's flex_attention has no backward pass there, and flash-attn no kernels at all.
        yield f"learner.attention is {config.attention}, which trains on cuda only: on a CPU use sdpa"
    if config.attention == "flash_attention_2" and config.dtype == "float32":
        yield "learner.attention is flash_attention_2, which has no float32: set learner.dtype to bfloat16"
    if config.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield "learner.attention is flash_attention_2, but the package flash-attn is not installed here: use sdpa"
    if config.offload and config.device == "cpu":
        yield "learner.offload is true, but learner.device is cpu, whose memory is the host's already: set it to false"
    if config.compile and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        yield f"learner.compile is true, but there is no C++ compiler here: neither $CXX nor {', '.join(COMPILERS)}"


def _wrong_loss(loss: LossConfig, minibatches: int) -> Iterator[str]:
    if loss.aggregation == "fixed" and loss.fixed_tokens == 0:
        yield "learner.loss.aggregation is fixed: set learner.loss.fixed_tokens, usually to rollout.max_tokens"
    if loss.dual_clip > 0 and loss.dual_clip <= 1 + loss.clip_high:
        yield (
            f"learner.loss.dual_clip is {loss.dual_clip:g}: expected 0 (none), or above 1 + learner.loss.clip_high="
            f"{1 + loss.clip_high:g}"
        )
    if loss.importance_low >= loss.importance_cap:
        yield (
            f"learner.loss.importance_low is {loss.importance_low:g} and importance_cap {loss.importance_cap:g}: low "
            "must be below cap"
        )
    ratio_is_one = loss.proximal == "current" or (loss.proximal == "recomputed" and minibatches == 1)
    if loss.kind in RATIO_KINDS and ratio_is_one:
        yield (
            f"learner.loss.kind is {loss.kind}, but against proximal={loss.proximal} its ratio is always 1: "
            "set learner.loss.proximal to sampled, or to recomputed with learner.minibatches above 1"
        )
    if loss.kl_coef > 0 and loss.kl_in == "loss" and loss.kl_estimator == "k1":
        yield (
            "learner.loss.kl_estimator is k1 in the loss, where its gradient is 0 on average: set it to k2 or k3, or "
            "learner.loss.kl_in to reward"
        )
