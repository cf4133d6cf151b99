"""Groups of answers to one problem each, as `math` gets them: a reference, and completions that differ."""

from rewards.sample import Sample

GROUP = 8
TEXT = "We look at the problem one step at a time. " * 40
KINDS: dict[str, tuple[str, str, str]] = {
    # reference; completion that is right; completion that is wrong. {n} is a number, {m} the one after it.
    "GSM8K": ("She has <<{n}*1={n}>>{n}.\n#### {n}", "so she has #### {n}", "so she has #### {m}"),
    "number in a box": ("{n}", "Therefore the answer is $\\boxed{{{n}}}$.", "Therefore it is $\\boxed{{{m}}}$."),
    "number in text": ("{n}024", "The answer is {n},024.", "The answer is {m},024."),
    "decimal": ("-{n}.5", "Thus $x = \\boxed{{-\\frac{{{twice}}}{{2}}}}$.", "Thus $x = \\boxed{{-{m}}}$."),
    "fraction": ("\\frac{{{n}}}{{4}}", "which gives \\boxed{{\\frac{{{n}}}{{4}}}}", "or \\boxed{{\\frac{{{m}}}{{4}}}}"),
    "root": ("\\sqrt{{{root}}}", "so $\\boxed{{{n}\\sqrt{{2}}}}$", "so $\\boxed{{{n}\\sqrt{{3}}}}$"),
    "polynomial": ("x^2+{double}x+{square}", "so $\\boxed{{(x+{n})^2}}$", "so $\\boxed{{(x+{m})^2}}$"),
    "set": ("\\{{{n},{m}\\}}", "so $\\boxed{{\\{{{m},{n}\\}}}}$", "so $\\boxed{{\\{{{n},{double}\\}}}}$"),
    "sine": ("\\sin({double}x)", "$\\boxed{{2\\sin({n}x)\\cos({n}x)}}$", "$\\boxed{{2\\sin({n}x)\\cos({m}x)}}$"),
}


def group(kind: str, number: int) -> list[tuple[Sample, bool]]:
    """Completions of one problem, every other one right, no two alike."""
    answer, right, wrong = KINDS[kind]
    rows = []
    for place in range(GROUP):
        is_right = place % 2 == 0
        m = number + (1 if is_right else 1 + place)
        values = {"n": number, "m": m, "twice": 2 * number + 1, "double": 2 * number, "square": number**2}
        text = TEXT + " " * place + (right if is_right else wrong).format(**values, root=2 * number**2)
        reference = answer.format(**values | {"m": number + 1}, root=2 * number**2)
        problem = {"answer": reference}
        rows.append((Sample(prompt="", completion=text, problem=problem, num_tokens=1, truncated=False), is_right))
    return rows
