"""The built-in `code` reward: does the program pass the problem's tests? It runs in the sandbox."""

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from rewards.config import RewardConfig
from rewards.sample import Sample
from rewards.sandbox import Sandbox

FIELDS = ("test_list", "input_output", "tests")
_fence = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:\r?\n```|\Z)", re.DOTALL | re.IGNORECASE)


class Tests(Struct, frozen=True, kw_only=True):
    """cases: (stdin, expected stdout). checks: statements that assert something; `setup` goes before them."""

    cases: tuple[tuple[str, str], ...] = ()
    checks: tuple[str, ...] = ()
    setup: str = ""


def code_reward(config: RewardConfig) -> Callable[[Sample], float]:
    """A function that scores a completion's program by the problem's tests.

    The program is the last fenced block, or, without one, the whole completion. The tests are found in the problem's
    `test_list` (MBPP), `input_output` (APPS, TACO) or `tests`; see `read_tests`.

    Raises: ValueError where the sandbox that was asked for cannot be had. The function: ValueError for a problem
        without tests or whose tests cannot be run; SandboxError.
    """
    sandbox = Sandbox(config.sandbox)
    sandbox.start()
    limits = config.code

    def score(sample: Sample) -> float:
        tests = read_tests(sample.problem)
        program = extract(sample.completion)
        deadline = time.monotonic() + limits.total_s
        if tests.checks:
            limit_s = min(limits.test_s * len(tests.checks), limits.total_s)
            verdict = sandbox.check(program, tests.checks, tests.setup, stop=not limits.partial, limit_s=limit_s)
            if verdict.fault:
                raise ValueError(f"the problem's tests cannot be run: {verdict.fault}")
            return share(verdict.passed, len(tests.checks), limits.partial)
        passed = 0
        for stdin, expected in tests.cases:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            outcome = sandbox.run(program, stdin, min(limits.test_s, left_s))
            if outcome.exit_code == 0 and not outcome.late and same_output(outcome.stdout, expected):
                passed += 1
            elif not limits.partial:
                break
        return share(passed, len(tests.cases), limits.partial)

    return score


def share(passed: int, total: int, partial: bool) -> float:
    return passed / total if partial else float(passed == total)


def extract(completion: str) -> str:
    """The last fenced block, one that was not closed included; the whole text where there is none."""
    blocks = _fence.findall(completion)
    return blocks[-1] if blocks else completion


def same_output(printed: bytes, expected: str) -> bool:
    """Equal line by line, spaces at the ends of lines and empty lines at the end left out."""
    return lines(printed.decode("utf-8", "replace")) == lines(expected)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def read_tests(problem: dict[str, Any]) -> Tests:
    """The tests of a data set's row.

    test_list: statements, with `test_imports` (statements) and `test_setup_code` before them (MBPP).
    input_output: {"inputs": [...], "outputs": [...]}, also as JSON text; with "fn_name", a function's arguments and its
    result (APPS, TACO). tests: a list of {"input", "output"} or of statements, also as JSON text.

    Raises: ValueError, in one line, where there are none, or some that are not understood.
    """
    present = [name for name in FIELDS if problem.get(name)]
    if not present:
        raise ValueError(
            f"the code reward needs tests in one of the fields {', '.join(FIELDS)}; the problem has: "
            f"{', '.join(problem) or 'none'}{' (empty)' if set(FIELDS) & problem.keys() else ''}"
        )
    name = present[0]
    value = parsed(name, problem[name])
    try:
        tests = READERS[name](value, problem)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"problem[{name!r}] is not understood: {type(error).__name__}: {error}") from None
    if not (tests.cases or tests.checks):
        raise ValueError(f"problem[{name!r}] has no tests")
    return tests


def parsed(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"problem[{name!r}] is neither a list nor JSON: {error}") from None


def _from_list(value: Any, problem: dict[str, Any]) -> Tests:
    imports = problem.get("test_imports") or []
    setup = "\n".join([*(imports if isinstance(imports, list) else [imports]), problem.get("test_setup_code") or ""])
    return Tests(checks=tuple(texts(value)), setup=setup)


def _from_input_output(value: Any, problem: dict[str, Any]) -> Tests:
    inputs, outputs = value["inputs"], value["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs: a test case is missing")
    name = value.get("fn_name")
    if not name:
        return Tests(
            cases=tuple((as_text(given), as_text(wanted)) for given, wanted in zip(inputs, outputs, strict=True))
        )
    if not str(name).isidentifier():
        raise ValueError(f"fn_name is {name!r}")
    pairs = zip(inputs, outputs, strict=True)
    return Tests(
        checks=tuple(f"assert plain({name}(*{given!r})) == plain({wanted!r})" for given, wanted in pairs), setup=PLAIN
    )


PLAIN = """
def plain(value):
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
"""
"""JSON has no tuples: a function that returns one is as right as one that returns a list."""


def _from_tests(value: Any, problem: dict[str, Any]) -> Tests:
    if value and isinstance(value[0], str):
        return Tests(checks=tuple(texts(value)), setup=problem.get("test_setup_code") or "")
    return Tests(cases=tuple((as_text(each["input"]), as_text(each["output"])) for each in value))


READERS: dict[str, Callable[[Any, dict[str, Any]], Tests]] = {
    "test_list": _from_list,
    "input_output": _from_input_output,
    "tests": _from_tests,
}


def texts(value: Sequence[Any]) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError("expected a list of texts")
    return value


def as_text(value: Any) -> str:
    """A text, or lines of it."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value
