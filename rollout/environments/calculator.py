"""The `calculator` tool: arithmetic, parsed into a tree and reckoned by us. Nothing is ever evaluated."""

import ast
import math
import operator
import warnings
from collections.abc import Callable

from rollout.environments.tool_calls import ToolEnvironment, tool_schema

MAX_CHARACTERS = 1000
MAX_BITS = 4096
"""Of an integer: what `9**9**9` would take is not to be found out."""

Number = int | float

OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Calculator(ToolEnvironment):
    tools = (tool_schema("calculator", "Works out an arithmetic expression.", "expression", "Such as (3 + 5) * 2 / 7"),)

    def __init__(self) -> None:
        super().__init__({"calculator": lambda expression: calculate(expression)})


def calculate(expression: str) -> str:
    """Numbers, + - * / // % ** and parentheses. Raises: ValueError, one line for the model."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression of {len(expression)} characters, at most {MAX_CHARACTERS} are taken")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(expression.strip(), mode="eval")
        return _text(_value(tree.body))
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("that is not an arithmetic expression") from None
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"that cannot be worked out: {error}") from None


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _apply(op, _value(left), _value(right))
    raise ValueError(f"only numbers, + - * / // % ** and parentheses are taken, not {type(node).__name__}")


def _apply(op: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow) and isinstance(left, int) and abs(right) * left.bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    return _bounded(OPERATORS[type(op)](left, right))


def _bounded(value: Number) -> Number:
    """A negative number to a broken power is complex."""
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("the result is no finite real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    return value


def _text(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"
