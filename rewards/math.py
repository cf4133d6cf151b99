"""The built-in `math` reward: does the completion's final answer equal the problem's?"""

import re
import threading
from typing import Any

from rewards.sample import Sample

FINAL_ANSWER_MARK = "####"
STEP_TIMEOUT_S = 3

_boxed = re.compile(r"\\boxed\s*{")


def math_reward(sample: Sample) -> float:
    """1.0 where the final answer is equal to the problem's `answer`, else 0.0.

    The reference may be a plain answer, LaTeX, or a worked solution that ends in "#### 42" (GSM8K). Of the
    completion counts what follows the last "####" where there is one, else the last boxed
    expression or, failing that, the last number.

    Raises: ValueError where the problem has no `answer`, or one without anything to compare with.
    """
    from math_verify import verify

    gold = _parse_answer(_reference_answer(sample.problem))
    if not gold:
        raise ValueError(f"problem['answer'] = {sample.problem['answer']!r} has no answer to compare with")
    marked = FINAL_ANSWER_MARK in sample.completion
    predicted = _parse_answer(_after_mark(sample.completion)) if marked else _parse(sample.completion)
    return float(verify(gold, predicted, timeout_seconds=_timeout())) if predicted else 0.0


def _reference_answer(problem: dict[str, Any]) -> str:
    if "answer" not in problem:
        raise ValueError(f"the math reward needs a field 'answer'; the problem has: {', '.join(problem) or 'none'}")
    return _after_mark(str(problem["answer"]))


def _after_mark(text: str) -> str:
    return text.rpartition(FINAL_ANSWER_MARK)[2].strip()


def _parse_answer(text: str) -> list[Any]:
    """A text that is nothing but an answer, so that LaTeX needs no dollars around it."""
    bare_latex = "\\" in text and "$" not in text and not _boxed.search(text)
    return _parse(f"${text}$") if bare_latex else _parse(text) or _parse(f"${text}$")


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=_timeout()))  # type: ignore[arg-type]


def _timeout() -> int | None:
    """math-verify 0.9 takes its time with signal.alarm, which only the main thread may use.

    A scoring process calls us in its main thread; elsewhere the caller's own deadline has to do.
    """
    return STEP_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
