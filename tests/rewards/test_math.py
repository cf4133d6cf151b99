from concurrent.futures import ThreadPoolExecutor

import pytest
from math_pairs import ours
from math_verify_pairs import THEIRS, Pair

from rewards.math import math_reward
from rewards.sample import Sample


def score(completion: str, answer: object) -> float:
    problem = {"answer": answer}
    return math_reward(Sample(prompt="", completion=completion, problem=problem, num_tokens=1, truncated=False))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "She has <<3+4=7>>7.\n#### 7"),
        ("The answer is \\boxed{1,234}.", "#### 1234"),
        ("It is 42.", "42"),
        ("It is 42.", 42),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("x = 3; #### 1/2", "\\frac12"),
        ("#### \\frac{1}{2}", "#### 0.5"),
        ("#### $18", "#### 18"),
        ("#### 18 dollars", "#### 18"),
        ("#### -5.0", "#### -5"),
        ("#### 3 was wrong, so #### 5", "5"),
    ],
)
def test_equal_answers(completion: str, answer: object) -> None:
    assert score(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("8", "#### 7"),
        ("", "#### 7"),
        ("####", "#### 7"),
        ("#### 7 and no, #### 8", "#### 7"),
        ("no number at all", "#### 7"),
        ("12", "\\frac12"),
    ],
)
def test_other_answers(completion: str, answer: object) -> None:
    assert score(completion, answer) == 0.0


def test_problem_without_an_answer() -> None:
    with pytest.raises(ValueError, match="needs a field 'answer'; the problem has: question"):
        math_reward(Sample(prompt="", completion="7", problem={"question": ""}, num_tokens=1, truncated=False))
    with pytest.raises(ValueError, match="has no answer to compare with"):
        score("7", "#### ")


def test_works_outside_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(score, "#### 7", "#### 7").result() == 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("\\boxed{3+2x}", "2x+3", 1.0),
        ("\\boxed{3}", "2x+3", 0.0),  # math-verify alone takes a plain reference's last number
        ("#### x^2-1", "(x-1)(x+1)", 1.0),
        ("#### The answer is 7", "7", 1.0),
        ("#### 18cm", "18", 1.0),
        ("#### 5 (five)", "5", 1.0),
    ],
)
def test_plain_expressions_need_no_dollars(completion: str, answer: str, reward: float) -> None:
    assert score(completion, answer) == reward


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{\\frac{1}{",
        "\\frac{" * 50,
        "\\boxed{\\int_0^}",
        "$$$",
        "\\left(\\right]",
        "}{",
        "\\begin{pmatrix}1&2",
        "\x00",
    ],
)
def test_malformed_latex_is_a_wrong_answer(completion: str) -> None:
    assert score(completion, "7") == 0.0


QUIRKS = {
    ("\\frac{7}{5}", "The answer is 7/5."): "the full stop makes it 7 / 5.0, a float, which is no fraction",
    ("2ab", "\\boxed{2ba}"): "`ba` is read as one name",
    **{(f"{n}", f"\\fbox{{{n}}}"): "\\fbox is not looked for" for n in (7, -12, 144)},
    **{(f"{n}", f"\\boxed {{{n}}}"): "nor is \\boxed with a space" for n in (7, -12, 144)},
    **{
        (f"{n}", f"First \\boxed{{1}} then \\boxed{{{n}}}"): "several boxes are one answer of several values"
        for n in (7, -12, 144)
    },
}
"""What a person would call equal and math-verify 0.9 does not. The reward says what math-verify says."""


def library(gold: str, completion: str) -> bool:
    from math_verify import parse, verify

    return verify(parse(gold, parsing_timeout=60), parse(completion, parsing_timeout=60), timeout_seconds=60)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would call an answer wrong for which a busy machine has no time."""
    monkeypatch.setattr("rewards.math.STEP_TIMEOUT_S", 60)


OTHER_SETTINGS = {
    ("$9$", "Answer $ \n 9 \n $"): "only LaTeX is looked for there; it is the number that is found",
    ("$9$", "Answer \\( \n 9 \n \\)"): "likewise",
    (
        "$(\\begin{pmatrix}\\frac{1}{3}\\\\ \\frac{1}{5} \\end{pmatrix})$",
        "$\\begin{pmatrix}0.33\\\\0.2 \\end{pmatrix}$",
    ): "rounded to two places there, to six here",
    ("$(\\frac{3}{5},\\frac{8}{3}]$", "$(0.6,2.6667]$"): "likewise",
    ("$x \\in [-2,7]$", "$-2 \\\\le x \\\\le 7$"): "allow_set_relation_comp is true there, and false unless set",
}
"""Cases that its tests run with other settings than its own defaults, which the reward uses."""


@pytest.mark.usefixtures("patient")
def test_agrees_with_math_verify_on_its_own_cases() -> None:
    assert len(set(THEIRS)) >= 250 and {pair[:2] for pair in THEIRS} >= OTHER_SETTINGS.keys()
    for gold, completion, equal in THEIRS:
        wanted = equal != ((gold, completion) in OTHER_SETTINGS)
        assert (score(completion, gold) == 1.0, library(gold, completion)) == (wanted, wanted), (gold, completion)


@pytest.mark.usefixtures("patient")
def test_agrees_with_math_verify_on_our_pairs() -> None:
    """Its references need dollars around LaTeX; given them, there is no disagreement at all."""
    pairs: list[Pair] = ours()
    assert len(set(pairs)) >= 300
    without_dollars = 0
    for gold, completion, equal in pairs:
        wanted = equal and (gold, completion) not in QUIRKS
        assert (score(completion, gold) == 1.0) == wanted, (gold, completion)
        if library(gold, completion) != wanted:
            without_dollars += 1
            assert "$" not in gold and library(f"${gold}$", completion) == wanted, (gold, completion)
    assert without_dollars < 60
    assert {pair[:2] for pair in pairs} >= QUIRKS.keys()
