from collections.abc import Callable
from typing import Any

import pytest

from rewards.code import code_reward, extract, read_tests, same_output
from rewards.config import CodeConfig, RewardConfig, SandboxConfig
from rewards.sample import Sample

ADD = "def add(a, b):\n    return a + b"
ECHO = "print(int(input()) + 1)"
Score = Callable[..., float]


@pytest.fixture(scope="module")
def score() -> Score:
    limits = {"test_s": 2.0, "total_s": 4.0}
    sandbox = SandboxConfig(kind="namespaces")
    rewards = {
        p: code_reward(RewardConfig(code=CodeConfig(partial=p, **limits), sandbox=sandbox)) for p in (True, False)
    }

    def call(completion: str, partial: bool = False, **problem: Any) -> float:
        sample = Sample(prompt="", completion=completion, problem=problem, num_tokens=1, truncated=False)
        return rewards[partial](sample)

    return call


def test_assertions(score: Score) -> None:
    tests = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], "test_setup_code": "x = 3"}
    assert score(f"```python\n{ADD}\n```", test_list=["assert add(1, 2) == x"], test_setup_code="x = 3") == 1.0
    assert score(ADD, **tests) == 0.0
    assert score(ADD, partial=True, **tests) == 0.5


def test_programs(score: Score) -> None:
    cases = {"inputs": ["1\n", "5\n"], "outputs": ["2\n", "7\n"]}
    assert score(ECHO, input_output={"inputs": ["1\n"], "outputs": ["2"]}) == 1.0
    assert score(ECHO, input_output=cases) == 0.0
    assert score(ECHO, partial=True, input_output=cases) == 0.5
    assert score(ECHO, tests='[{"input": "1", "output": "2"}]') == 1.0
    assert score(f"{ECHO}\nraise SystemExit(1)", tests=[{"input": "1", "output": "2"}]) == 0.0


def test_functions_of_apps(score: Score) -> None:
    cases = '{"fn_name": "pair", "inputs": [[1, 2]], "outputs": [[2, 1]]}'
    assert score("def pair(a, b): return (b, a)", input_output=cases) == 1.0
    assert score("def pair(a, b): return (a, b)", input_output=cases) == 0.0


def test_a_program_that_hangs_is_wrong_and_costs_its_time(score: Score) -> None:
    assert score("while True: pass", tests=[{"input": "", "output": ""}] * 9, partial=True) == 0.0
    assert score("while True: pass", test_list=["assert add(1, 2) == 3"]) == 0.0


@pytest.mark.parametrize("code", ["print('3')", "import os; os._exit(0)", "def add(a, b): return a", "not python", ""])
def test_other_programs_are_wrong(score: Score, code: str) -> None:
    assert score(code, test_list=["assert add(1, 2) == 3"]) == 0.0


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (
            {"question": 1},
            "needs tests in one of the fields test_list, input_output, tests; the problem has: question$",
        ),
        ({"test_list": []}, r"the problem has: test_list \(empty\)"),
        ({"tests": "{"}, r"problem\['tests'\] is neither a list nor JSON"),
        ({"test_list": [1]}, r"problem\['test_list'\] is not understood: TypeError: expected a list of texts"),
        ({"tests": [{"input": "1"}]}, r"problem\['tests'\] is not understood: KeyError: 'output'"),
        ({"input_output": {"inputs": ["1", "2"], "outputs": ["1"]}}, "2 inputs but 1 outputs: a test case is missing"),
        ({"input_output": {"inputs": [], "outputs": []}}, "has no tests"),
    ],
)
def test_bad_tests_are_one_line(problem: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_tests(problem)
    assert "\n" not in str(caught.value)


def test_tests_that_cannot_run_are_an_error(score: Score) -> None:
    with pytest.raises(ValueError, match="the problem's tests cannot be run: SyntaxError"):
        score(ADD, test_list=["assert add("])


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("So:\n```python\na\n```\nor\n```py\nb\n```\n.", "b"),
        ("```\na\n```", "a"), ("```python\na", "a"), ("a = 1", "a = 1"), ("```Python \r\na\r\n```", "a"),
    ],
)  # fmt: skip
def test_the_last_block_is_the_program(completion: str, code: str) -> None:
    assert extract(completion) == code


def test_output_is_compared_by_lines() -> None:
    assert same_output(b"1 2 \n3\n\n", "1 2\n3") and same_output(b"", "\n")
    assert not same_output(b"1 2\n3", "1 2 3") and not same_output(b"\xff", "x")
