from typing import Any

import pytest
from math_pairs import ours
from math_verify_pairs import THEIRS
from sympy import Basic, srepr

from rewards.latex import _TwoStages, _with_sll, parse

NEEDS_CONTEXT = "x^2+14x+49"


def whole(parsed: list[Any]) -> list[str]:
    """With the assumptions about each variable."""
    return [srepr(each) if isinstance(each, Basic) else repr(each) for each in parsed]


@pytest.fixture
def plainly() -> Any:
    """math-verify's own, which keeps what it has parsed: what ours has, too."""
    from math_verify import parser

    def parse_plainly(text: str) -> list[Any]:
        parser.parse_latex_cached.cache_clear()
        return list(parser.parse(text, parsing_timeout=None))  # type: ignore[arg-type]

    return parse_plainly


def test_it_parses_as_math_verify_does(plainly: Any) -> None:
    from math_verify.parser import parse_latex_cached

    texts = {text for gold, completion, _ in (*THEIRS, *ours()) for text in (gold, f"${gold}$", completion)}
    assert len(texts) > 800
    for text in sorted(texts):
        parse_latex_cached.cache_clear()
        assert whole(parse(text, None)) == whole(plainly(text)), text


def test_what_needs_its_context_is_parsed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from math_verify.parser import parse_latex_cached

    parse("$1$", None)
    made: list[Any] = []
    monkeypatch.setattr("rewards.latex._with_sll", lambda parser: made.append(parser) or _with_sll(parser))
    make = _TwoStages.__init__

    def counted(self: _TwoStages, of: Any) -> None:
        make(self, lambda: made.append("made") or of())

    monkeypatch.setattr(_TwoStages, "__init__", counted)
    for text, times in (("1+2", 1), (NEEDS_CONTEXT, 2)):
        parse_latex_cached.cache_clear()
        made.clear()
        assert isinstance(parse(f"${text}$", None)[0], Basic)
        assert made.count("made") == times


def test_others_have_the_parser_as_it_is(plainly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parse("$1$", None)
    monkeypatch.setattr("rewards.latex._with_sll", lambda parser: pytest.fail("it was asked"))
    assert plainly("$2x$")
