"""math-verify's `parse`, several times quicker on sines, sets and polynomials, and with the same result.

Where the grammar of latex2sympy leaves ANTLR two ways, it predicts with the whole context (LL) and keeps nothing of
that from one text to the next: nine tenths of the time that `2\\sin(x)\\cos(x)` takes. SLL does without the context,
and keeps its predictions. A parse that succeeds with it is the one that LL gives (`PredictionMode.SLL` in ANTLR's
documentation); one that fails is begun again with LL. Written against math-verify 0.9 with ANTLR 4.13.2.
"""

import threading
from functools import cache
from typing import Any

_quick = threading.local()
"""`is_on` within our own calls: math-verify's other users have its parser as it is."""


def parse(text: str, timeout_s: int | None) -> list[Any]:
    """What `math_verify.parse` gives. Args: timeout_s: in the main thread; None elsewhere."""
    from math_verify import parse

    _offer_sll()
    _quick.is_on = True
    try:
        return list(parse(text, parsing_timeout=timeout_s))  # type: ignore[arg-type]
    finally:
        _quick.is_on = False


@cache
def _offer_sll() -> None:
    """latex2sympy makes its parsers in a method, and has no setting for how they predict."""
    from latex2sympy2_extended import latex2sympy2

    maker: Any = latex2sympy2._Latex2Sympy
    plainly = maker.create_parser

    def create_parser(self: Any, latex: str) -> Any:
        return _TwoStages(lambda: plainly(self, latex)) if getattr(_quick, "is_on", False) else plainly(self, latex)

    maker.create_parser = create_parser


class _TwoStages:
    """A parser, as far as latex2sympy uses it."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def math(self) -> Any:
        """Raises: whatever the second stage raises; math-verify's TimeoutException, which is no Exception."""
        try:
            return _with_sll(self._make()).math()
        except Exception:  # latex2sympy raises nothing narrower at a syntax error
            return self._make().math()


def _with_sll(parser: Any) -> Any:
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from antlr4.atn.PredictionMode import PredictionMode

    parser._interp = ParserATNSimulator(parser, parser.atn, *_kept_predictions(type(parser)))
    parser._interp.predictionMode = PredictionMode.SLL
    return parser


@cache
def _kept_predictions(kind: Any) -> tuple[list[Any], Any]:
    """Of SLL alone: LL would take its predictions for sure."""
    from antlr4.dfa.DFA import DFA
    from antlr4.PredictionContext import PredictionContextCache

    return [DFA(state, decision) for decision, state in enumerate(kind.atn.decisionToState)], PredictionContextCache()
