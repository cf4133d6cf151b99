"""The calculator, the form of calls, and the Python tool."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.config import RewardConfig
from rollout.environments.calculator import Calculator, calculate
from rollout.environments.python_tool import PythonTool, check_sandbox


def call(name: str = "calculator", **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3+5*2", "13"),
        (" -(3 + 5) ** 2 ", "-64"),
        ("7/2", "3.5"),
        ("7//2 + 7%2", "4"),
        ("1/3", "0.333333333333"),
        ("2**0.5", "1.41421356237"),
        ("0.1+0.2", "0.3"),
        ("2**2000", str(2**2000)),
    ],
)
def test_arithmetic(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "1+", "a", "__import__('os').system('true')", "f(1)", "[1][0]", "1 if 1 else 2", "'a'*10", "True+1", "1<2",
        "1/0", "5%0", "9**9**9", "2**-9**9", "(-8)**0.5", "1e308*10", "1.5**99999", "(" * 400 + "1", "1j",
        "1;2", "lambda: 1", "1" * 1001, "1" * 1000, "x:=1", "\x00", "1 is 1", "-" * 999 + "1", "0 ** -1", "\ud800",
        "9" * 900 + "**2.5",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_one_line(expression: str) -> None:
    try:
        calculate(expression)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert set(expression) <= set("-1") and len(expression) == 1000, "long, but arithmetic"


numbers = st.integers(-50, 50).map(lambda number: f"({number})")
expressions = st.recursive(
    numbers, lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map("".join), max_leaves=8
)


@settings(deadline=None)
@given(expressions)
def test_it_agrees_with_python(expression: str) -> None:
    assert calculate(expression) == str(eval(expression))


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/%.() eE_jx", max_size=40))
def test_any_text_gives_a_number_or_one_line(text: str) -> None:
    try:
        assert math.isfinite(float(calculate(text)))
    except ValueError as error:
        assert "\n" not in str(error)
    except OverflowError:  # a large integer, of this test's float()
        pass


def test_calls_are_answered_in_order() -> None:
    step = Calculator().step(None, f"First {call(expression='1+1')} then {call(expression='2*4')}")
    assert (step.output, step.done, step.tool_calls, step.tool_errors) == ("2\n8", False, 2, 0)


def test_a_turn_without_a_call_is_the_last() -> None:
    assert Calculator().step(None, "8").done
    assert Calculator().step(None, "<tool_call>{} and no end").done


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("<tool_call>3+5</tool_call>", "error: "),
        ('<tool_call>{"arguments": {}}</tool_call>', "error: ValidationError: Object missing required field `name`"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": 3}}</tool_call>', "error: ValidationError"),
        (call("search", query="x"), "error: no tool 'search'; there is calculator"),
        (call(code="1"), "error: TypeError"),
        (call(expression="1/0"), "error: that cannot be worked out: division by zero"),
    ],
)
def test_a_wrong_call_is_told_and_counted(turn: str, said: str) -> None:
    step = Calculator().step(None, turn)
    assert step.output.startswith(said) and "\n" not in step.output and len(step.output) <= 300
    assert (step.done, step.tool_calls, step.tool_errors) == (False, 1, 1)


def test_without_a_sandbox_no_python_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.environments.python_tool.SANDBOX", "rewards.there_is_none")
    with pytest.raises(ValueError, match="has no sandbox"):
        check_sandbox()
    with pytest.raises(ValueError, match="has no sandbox"):
        PythonTool(RewardConfig(), 1.0)


@pytest.mark.slow
def test_python_runs_in_the_sandbox() -> None:
    pytest.importorskip("rewards.sandbox")
    tool = PythonTool(RewardConfig(), 2.0)
    for code, output, errors in [
        ("print(6*7)", "42", 0),
        ("print(1)\n1/0", "1\nerror: ZeroDivisionError: division by zero", 1),
        ("import time; time.sleep(60)", "error: the program took longer than 2 s", 1),
        ("print(open('/etc/passwd').read())", None, 1),
    ]:
        step = tool.step(None, call("python", code=code))
        assert step.tool_errors == errors, step.output
        assert output is None or step.output == output
