"""The built-in `math` reward: does the completion's final answer equal the problem's?"""

import logging
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rewards.config import RewardConfig
from rewards.latex import parse
from rewards.sample import Sample
from rewards.symbolic import same_value

FINAL_ANSWER_MARK = "####"
STEP_TIMEOUT_S = 3
QUICK_TIMEOUT_S = 1

_boxed = re.compile(r"\\boxed\s*{")
_operator = re.compile(r"(?<=\S)\s*[-+*^=<>|!({\[]|^[(\[{|]|\d[a-zA-Z]")
_word = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+\s+[A-Za-z]{2,}")


def make_math_reward(config: RewardConfig) -> Callable[[Sample], float]:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each expression that takes too long, whole
    parse("$1$", None)  # patterns and grammar: no answer's time pays for them
    return math_reward


def math_reward(sample: Sample) -> float:
    """1.0 where the final answer is equal to the problem's `answer`, else 0.0.

    The reference may be a plain answer, LaTeX, or a worked solution that ends in "#### 42" (GSM8K). Of the
    completion counts what follows the last "####" where there is one, else what is boxed (several: all of
    it, as math-verify has it) or, failing that, the last LaTeX or number.

    Raises: ValueError where the problem has no `answer`, or one without anything to compare with.
    """
    gold = list(_parse_reference(_reference_answer(sample.problem)))
    if not gold:
        raise ValueError(f"problem['answer'] = {_reference_answer(sample.problem)!r} has no answer to compare with")
    marked = FINAL_ANSWER_MARK in sample.completion
    predicted = _parse_answer(_after_mark(sample.completion)) if marked else _parse(sample.completion)
    return float(_equal(gold, predicted)) if predicted else 0.0


def _reference_answer(problem: dict[str, Any]) -> str:
    """The field `answer` or, in the schema of verl's data sets, `reward_model.ground_truth`."""
    if "answer" in problem:
        return _after_mark(str(problem["answer"]))
    nested = problem.get("reward_model")
    if isinstance(nested, dict) and "ground_truth" in nested:
        return _after_mark(str(nested["ground_truth"]))
    raise ValueError(f"the math reward needs a field 'answer'; the problem has: {', '.join(problem) or 'none'}")


@lru_cache(maxsize=1024)
def _parse_reference(answer: str) -> tuple[Any, ...]:
    """All completions of a group are compared with the same one."""
    return tuple(_parse_answer(answer))


def _after_mark(text: str) -> str:
    return text.rpartition(FINAL_ANSWER_MARK)[2].strip()


def _parse_answer(text: str) -> list[Any]:
    """A text that is nothing but an answer, so that LaTeX needs no dollars around it.

    Nor does an expression, `2x+3`, of which math-verify would otherwise take the last number.
    """
    if "$" in text or _boxed.search(text):
        return _parse(text) or _parse(f"${text}$")
    expression = "\\" in text or (_operator.search(text) and not _word.search(text))
    return _parse(f"${text}$") if expression else _parse(text) or _parse(f"${text}$")


def _parse(text: str) -> list[Any]:
    return parse(text, _timeout())


def _equal(gold: list[Any], predicted: list[Any]) -> bool:
    """What `verify` says. Each list has an expression, a text, or both: it compares all pairs, and one has to agree."""
    from math_verify import verify

    texts = {each.strip() for each in gold if isinstance(each, str)} - {""}
    if any(isinstance(each, str) and each.strip() in texts for each in predicted):
        return True
    quick = _quickly(gold[0], predicted[0])
    return verify(gold, predicted, timeout_seconds=_timeout()) if quick is None else quick


def _quickly(gold: Any, predicted: Any) -> bool | None:
    """None for what is not sure, or takes longer than it is worth."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        return timeout(QUICK_TIMEOUT_S if _timeout() else None)(same_value)(gold, predicted)
    except (Exception, TimeoutException):  # sympy may raise anything, and math-verify has ways around some of it
        return None


def _timeout() -> int | None:
    """math-verify 0.9 takes its time with signal.alarm, which only the main thread may use.

    A scoring process calls us in its main thread; elsewhere the caller's own deadline has to do.
    """
    return STEP_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
