import asyncio
from itertools import combinations
from pathlib import Path

import pytest

from rewards.config import RewardConfig
from rewards.math import math_reward
from rewards.pool import RewardPool
from rewards.sample import Sample
from rewards.symbolic import same_value

EXPRESSIONS = (
    "x^2+2x+1", "(x+1)^2", "x^2-1", "(x+y)(x-y)", "\\sin(2x)", "2\\sin(x)\\cos(x)", "\\sqrt{x^2}", "|x|", "x+0",
    "\\sqrt{8}", "2\\sqrt{2}", "\\sqrt{2}\\cdot 2", "10^{-9}", "\\frac{x}{y}", "e^{2x}", "\\ln(x^2)", "2\\ln(x)", "3!",
)  # fmt: skip


def parsed(latex: str) -> object:
    from math_verify import parse

    return parse(f"${latex}$", parsing_timeout=None)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "predicted", "equal"),
    [
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+1", "(x+2)^2", False),
        ("(a+b)(a-b)", "a^2-b^2", True),
        ("ab+c", "ac+b", False),
        ("\\sin(2x)", "2\\sin(x)\\cos(x)", True),
        ("\\sin(2x)", "2\\sin(x)", False),
        ("\\sqrt{2}", "\\sqrt{3}", False),
        ("3", "4", False),
        ("2", "\\frac{1+\\sqrt{5}}{2}", False),
        ("\\frac{1}{x+1}", "\\frac{1}{x+2}", False),
        ("3+4i", "3-4i", False),
        # not sure, or not its business
        ("\\frac{x^2-1}{x-1}", "x+1", None),
        ("0.5x", "x", None),
        ("x", "y", None),
        ("x<3", "x<4", None),
        ("\\{1,2\\}", "\\{1,3\\}", None),
        ("28\\%", "29\\%", None),
        ("f(x)", "f(y)", None),
        ("\\sum_{k=1}^{10} k", "54", None),
        ("(x+1)^{100}", "(1+x)^{99}(x+1)", None),
        ("10^{-9}", "10^{-8}", None),
    ],
)
def test_what_it_knows(gold: str, predicted: str, equal: bool | None) -> None:
    assert same_value(parsed(gold), parsed(predicted)) is equal


def test_it_never_contradicts_math_verify() -> None:
    from math_verify import verify

    known = 0
    expressions = [(latex, parsed(latex)) for latex in EXPRESSIONS]
    for (gold, one), (predicted, other) in combinations(expressions, 2):
        equal = same_value(one, other)
        known += equal is not None
        assert equal in (None, verify(one, other, timeout_seconds=None)), (gold, predicted)  # type: ignore[arg-type]
    assert known > len(EXPRESSIONS) ** 2 / 4


ENDLESS = ("9^{9^{9^{9}}}", "99999999!", "(x+1)^{100000}", "\\prod_{k=1}^{10^7} k")


def test_an_endless_expression_costs_its_own_time_and_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = RewardPool(RewardConfig(timeout_s=30.0), tmp_path)
        try:
            await pool.start()
            texts = ("\\boxed{3+2x}", *(f"\\boxed{{{latex}}}" for latex in ENDLESS[:1]), "\\boxed{2x}", "so $2x+3$")
            samples = [
                Sample(prompt="", completion=text, problem={"answer": "2x+3"}, num_tokens=1, truncated=False)
                for text in texts
            ]
            assert [part["reward"] for part in await pool.score(samples)] == [1.0, 0.0, 0.0, 1.0]
            assert pool.counters().get("math.failed", 0) == 0
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 100))


@pytest.mark.parametrize("latex", ENDLESS[1:])
def test_an_endless_expression_is_wrong(latex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.math.STEP_TIMEOUT_S", 1)
    problem = {"answer": "x^2+1"}
    sample = Sample(prompt="", completion=f"\\boxed{{{latex}}}", problem=problem, num_tokens=1, truncated=False)
    assert math_reward(sample) == 0.0
