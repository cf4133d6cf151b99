"""Two expressions, told apart or found equal in a millisecond, where math-verify would simplify for ten to a hundred.

It says nothing where it is not sure of what math-verify 0.9 would say. That simplifies the difference and asks whether
it is zero. Here both are evaluated at two points: expressions that differ by more than rounding at one of them are not
equal, whatever is simplified. Polynomials whose difference expands to nothing are.
"""

from typing import Any

POINTS = ("0.7390851", "1.6180339")
"""Values of the first variable; the others get multiples of them, so that x and y are told apart."""
STEP = "0.5772156"
DIGITS = 15
TOLERANCE = 1e-6
"""Differences that are larger, absolute and as a share, are no rounding; math-verify calls 1e-15 zero."""
LARGEST_POWER = 12
"""Of a polynomial that is expanded: (x+1)^100000 is not."""


def same_value(gold: Any, predicted: Any) -> bool | None:
    """Are two parsed answers equal? None where math-verify is to be asked.

    Raises: whatever sympy raises; the caller has a deadline for it.
    """
    if not (_is_plain(gold) and _is_plain(predicted)):
        return None
    if _differ(gold, predicted):
        return False
    return True if _same_form(gold, predicted) else None


def _is_plain(expression: Any) -> bool:
    """Numbers and functions of numbers and variables, for which math-verify does nothing but simplify.

    It rounds floats and percentages, compares lone variables by name, and has rules of its own for all that is no Expr.
    """
    import sympy

    if not isinstance(expression, sympy.Expr) or isinstance(expression, sympy.Symbol | sympy.MatrixExpr):
        return False
    others = (sympy.Float, sympy.UnevaluatedExpr, sympy.MatrixExpr, sympy.Sum, sympy.Product, sympy.Integral)
    more = (sympy.Limit, sympy.Derivative, sympy.core.function.AppliedUndef, sympy.factorial, sympy.binomial)
    return bool(expression.is_commutative) and not expression.has(*others, *more)


def _differ(gold: Any, predicted: Any) -> bool:
    import sympy

    variables = sorted(gold.free_symbols | predicted.free_symbols, key=str)
    for point in POINTS if variables else POINTS[:1]:
        values = {symbol: sympy.Float(point) + place * sympy.Float(STEP) for place, symbol in enumerate(variables)}
        one, other = (_number(expression, values) for expression in (gold, predicted))
        if one is not None and other is not None and abs(one - other) > TOLERANCE * (1 + abs(one)):
            return True
    return False


def _number(expression: Any, values: dict[Any, Any]) -> complex | None:
    """None for what is no finite number there."""
    try:
        number = complex(expression.evalf(DIGITS, subs=values))
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        return None
    return number if abs(number) < 1e100 else None


def _same_form(gold: Any, predicted: Any) -> bool:
    """Polynomials, of sines and cosines too, which are polynomials of exponentials."""
    import sympy

    difference = gold - predicted
    waves = tuple(difference.atoms(sympy.sin, sympy.cos))
    generators = (*difference.free_symbols, *waves)
    if not difference.free_symbols or not difference.is_polynomial(*generators):
        return False
    if any(power.exp.is_Integer and power.exp > LARGEST_POWER for power in difference.atoms(sympy.Pow)):
        return False
    return sympy.expand(difference.rewrite(sympy.exp) if waves else difference) == 0
