from pathlib import Path

import pytest

from rewards.resolve import load_reward
from rewards.sample import Sample


def sample(completion: str = "12") -> Sample:
    return Sample(prompt="p", completion=completion, problem={}, num_tokens=2, truncated=False)


def test_function_of_a_file_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(sample):\n    return len(sample.completion)\n")
    assert load_reward("mine.py:length", tmp_path)(sample()) == 2
    assert load_reward(f"{tmp_path}/mine.py:length", Path("elsewhere"))(sample("abc")) == 3


def test_file_may_define_dataclasses(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int\n"
    (tmp_path / "mine.py").write_text(text + "def f(sample):\n    return A(3).x\n")
    assert load_reward("mine.py:f", tmp_path)(sample()) == 3


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nothing", "expected math, code, reasoning_gym, format, length, judge or PATH.py:FUNCTION"),
        ("mine.py", "expected math, code, reasoning_gym, format, length, judge or PATH.py:FUNCTION"),
        ("mine.py:", "expected math, code, reasoning_gym, format, length, judge or PATH.py:FUNCTION"),
        ("mine.py:a b", "expected math, code, reasoning_gym, format, length, judge or PATH.py:FUNCTION"),
        ("mine.txt:f", "expected math, code, reasoning_gym, format, length, judge or PATH.py:FUNCTION"),
        ("missing.py:f", "no such file"),
        ("mine.py:absent", "has no function 'absent'"),
        ("mine.py:CONSTANT", "'CONSTANT' is a int, not a function"),
        ("broken.py:f", "SyntaxError"),
        ("raises.py:f", "ZeroDivisionError: division by zero"),
        ("exits.py:f", "SystemExit"),
    ],
)
def test_bad_references_are_one_line(tmp_path: Path, reference: str, says: str) -> None:
    (tmp_path / "mine.py").write_text("CONSTANT = 3\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=r"reward\.function=") as caught:
        load_reward(reference, tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_import_error_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("x = 1\ny = x / 0\n")
    with pytest.raises(ValueError, match=r"raises\.py:2\)$"):
        load_reward("raises.py:f", tmp_path)
