"""Pairs of a reference answer and a completion, and whether they say the same.

Drawn from values by families; `math_verify_pairs` has those of math-verify.
"""

from fractions import Fraction
from itertools import product

from math_verify_pairs import Pair

FRACTIONS = [
    Fraction(n, d) for n, d in ((1, 2), (3, 4), (-2, 3), (7, 5), (22, 7), (-9, 4), (5, 8), (11, 3), (1, 9), (13, 6))
]
WAYS_AROUND = (
    "The answer is ${}$.",
    "\\boxed{{{}}}",
    "So we get $\\boxed{{{}}}$, as was to be shown.",
    "#### {}",
    "Thus $x = {}$.",
)


def ours() -> list[Pair]:
    return [
        *fractions(), *percentages(), *intervals(), *sets_and_points(), *units(), *scientific(), *boxed(), *expressions(),
        *around(), *roots(),
    ]  # fmt: skip


def latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def fractions() -> list[Pair]:
    pairs: list[Pair] = []
    for value in FRACTIONS:
        other = value + Fraction(1, value.denominator)
        pairs += [(latex(value), way.format(latex(value)), True) for way in WAYS_AROUND]
        pairs += [(f"{value}", f"\\boxed{{{latex(value)}}}", True), (latex(value), f"The answer is {value}.", True)]
        pairs += [(latex(value), f"\\boxed{{{latex(other)}}}", False), (f"{value}", f"#### {other}", False)]
        scaled = f"\\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}"
        pairs += [(latex(value), f"$\\boxed{{{scaled}}}$", True)]
    return pairs


def percentages() -> list[Pair]:
    pairs: list[Pair] = []
    for number in (5, 12, 30, 75, 110):
        pairs += [(f"{number}\\%", f"\\boxed{{{number}\\%}}", True), (f"{number}%", f"The share is {number}%.", True)]
        pairs += [(f"{number}\\%", f"It is {number} percent.", True), (f"{number}", f"\\boxed{{{number}\\%}}", True)]
        pairs += [(f"{number}\\%", f"\\boxed{{{number + 1}\\%}}", False)]
    return pairs


def intervals() -> list[Pair]:
    pairs: list[Pair] = []
    for low, high in ((0, 1), (-3, 5), (2, 7)):
        for left, right in product("[(", "])"):
            text = f"{left}{low},{high}{right}"
            pairs += [(f"${text}$", f"$x \\in {text}$", True), (f"${text}$", f"\\boxed{{{text}}}", True)]
            pairs += [(f"${text}$", f"\\boxed{{{left}{low},{high + 1}{right}}}", False)]
    ends = [
        ("(-\\infty, 3]", "(-\\infty,3]", True),
        ("[2,\\infty)", "[2, \\infty)", True),
        ("[2,\\infty)", "[3,\\infty)", False),
    ]
    unions = [
        ("(-\\infty,1)\\cup(2,\\infty)", "(-\\infty,1)\\cup(2,\\infty)", True),
        ("[0,1]\\cup[2,3]", "[0,1]\\cup[2,4]", False),
    ]
    return pairs + [(f"${gold}$", f"\\boxed{{{said}}}", same) for gold, said, same in ends + unions]


def sets_and_points() -> list[Pair]:
    pairs: list[Pair] = []
    for a, b, c in ((1, 2, 3), (-1, 0, 4), (5, 7, 11)):
        pairs += [(f"$\\{{{a},{b},{c}\\}}$", f"\\boxed{{\\{{{c},{a},{b}\\}}}}", True)]
        pairs += [(f"$\\{{{a},{b}\\}}$", f"$\\boxed{{\\{{{a},{c}\\}}}}$", False)]
        pairs += [(f"$\\{{{a},{b},{c}\\}}$", f"\\boxed{{{a},{b},{c}}}", True)]
        pairs += [
            (f"$({a},{b})$", f"The point is $\\boxed{{({a}, {b})}}$.", True),
            (f"$({a},{b})$", f"\\boxed{{({b},{a})}}", False),
        ]
        pairs += [(f"$({a},{b},{c})$", f"$({a},{b},{c})$", True), (f"$({a},{b},{c})$", f"$({a},{c},{b})$", False)]
    return pairs


def units() -> list[Pair]:
    pairs: list[Pair] = []
    for unit in ("cm", "meters", "km/h", "kg", "dollars", "square units", "hours"):
        pairs += [(f"18 {unit}", f"#### 18 {unit}", True), ("18", f"\\boxed{{18\\text{{ {unit}}}}}", True)]
        pairs += [("18", f"#### 18 {unit}", True), ("18", f"#### 17 {unit}", False)]
    money = [
        ("18", "$18", True),
        ("1250", "$1,250", True),
        ("18.50", "$18.5", True),
        ("18", "18€", True),
        ("45", "45^\\circ", True),
    ]
    return pairs + [(gold, f"#### {said}", same) for gold, said, same in money]


def scientific() -> list[Pair]:
    pairs: list[Pair] = []
    for mantissa, power in ((3, 5), (1.5, 3), (2.25, 4), (6, -3), (7.1, -2)):
        value = f"{mantissa * 10.0**power:.10f}".rstrip("0").rstrip(".")
        text = f"{mantissa} \\times 10^{{{power}}}"
        pairs += [(value, f"\\boxed{{{text}}}", True), (f"${text}$", f"The answer is {value}.", True)]
        pairs += [
            (f"${text}$", f"\\boxed{{{mantissa} \\cdot 10^{{{power}}}}}", True),
            (f"${text}$", f"\\boxed{{{mantissa} \\times 10^{{{power + 1}}}}}", False),
        ]
    return pairs


def boxed() -> list[Pair]:
    pairs: list[Pair] = []
    for number in (7, -12, 144):
        pairs += [
            (f"\\boxed{{{number}}}", f"so $\\boxed{{{number}}}$", True),
            (f"{number}", f"\\boxed{{\\boxed{{{number}}}}}", True),
        ]
        pairs += [(f"{number}", f"\\fbox{{{number}}}", True), (f"{number}", f"\\boxed{{\\text{{{number}}}}}", True)]
        pairs += [
            (f"{number}", f"First \\boxed{{1}} then \\boxed{{{number}}}", True),
            (f"{number}", f"\\boxed{{{number}}} is not 99.", True),
        ]
        pairs += [(f"{number}", f"\\boxed{{x={number}}}", True), (f"{number}", f"\\boxed{{{number}", False)]
        pairs += [(f"{number}", f"$$\\boxed{{\n{number}\n}}$$", True), (f"{number}", f"\\boxed {{{number}}}", True)]
        pairs += [(f"{number}", f"\\boxed{{{number + 1}}} not {number}", False), (f"{number}", "\\boxed{}", False)]
    return pairs


def expressions() -> list[Pair]:
    return [
        (gold, f"\\boxed{{{said}}}", same)
        for gold, said, same in (
            ("x^2+2x+1", "(x+1)^2", True), ("x^2-1", "(x-1)(x+1)", True), ("2x+3", "3+2x", True), ("2x+3", "2x+4", False),
            ("\\frac{x}{2}", "0.5x", True), ("\\sin^2 x+\\cos^2 x", "1", True), ("a(b+c)", "ab+ac", True), ("e^{2x}", "(e^x)^2", True),
            ("\\ln 8", "3\\ln 2", True), ("\\log_2 8", "3", True), ("\\pi/4", "\\frac{\\pi}{4}", True), ("2\\pi", "6.28", False),
            ("n!", "n!", True), ("\\binom{5}{2}", "10", True), ("2^{10}", "1024", True), ("x=5", "5", True), ("y=2x+1", "y=2x+1", True),
            ("y=2x+1", "2x+1", True), ("x<3", "x<3", True), ("x<3", "x\\le 3", False), ("x>2", "2<x", True), ("-x+1", "1-x", True),
            ("\\frac{1}{x+1}", "\\frac{1}{1+x}", True), ("i", "i", True), ("3+4i", "4i+3", True), ("|x|", "|x|", True),
            ("\\frac{d}{2}", "\\frac{d}{3}", False), ("2ab", "2ba", True), ("x^{-1}", "\\frac{1}{x}", True), ("\\infty", "\\infty", True),
            ("\\emptyset", "\\emptyset", True), ("\\text{Yes}", "\\text{Yes}", True), ("\\text{(B)}", "\\text{(B)}", True), ("\\text{B}", "\\text{C}", False),
        )
    ]  # fmt: skip


def around() -> list[Pair]:
    pairs: list[Pair] = []
    texts = (
        "First 3, then 5, in the end {}.", "Therefore the answer is: {}", "**Answer:** {}", "Final Answer: The final answer is ${}$. I hope it is correct.",
        "#### {}", "We find\n\\[ {} \\]", "Answer: \\( {} \\)", "= {}",
    )  # fmt: skip
    for number, text in product(("42", "-7", "3.14", "1,024"), texts):
        pairs += [(number.replace(",", ""), text.format(number), True)]
    return pairs + [("42", text.format("43"), False) for text in texts]


def roots() -> list[Pair]:
    pairs: list[Pair] = []
    for n in (2, 3, 5):
        pairs += [
            (f"\\sqrt{{{n}}}", f"\\boxed{{\\sqrt{n}}}", True),
            (f"\\sqrt{{{4 * n}}}", f"\\boxed{{2\\sqrt{{{n}}}}}", True),
        ]
        pairs += [
            (f"\\frac{{1}}{{\\sqrt{{{n}}}}}", f"\\boxed{{\\frac{{\\sqrt{{{n}}}}}{{{n}}}}}", True),
            (f"\\sqrt{{{n}}}", f"\\boxed{{\\sqrt{{{n + 1}}}}}", False),
        ]
        pairs += [
            (f"\\sqrt[3]{{{8 * n}}}", f"\\boxed{{2\\sqrt[3]{{{n}}}}}", True),
            (f"{n}\\sqrt{{2}}", f"\\boxed{{\\sqrt{{{2 * n * n}}}}}", True),
        ]
    return pairs
