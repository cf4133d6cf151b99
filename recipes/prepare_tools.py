"""Make the problems of `grpo_tools`: sums in words whose numbers are too large to be added up in one's head.

    python recipes/prepare_tools.py --out .cache/tools --seed 0

OUT gets `train.jsonl` and `eval.jsonl`, whose problems differ; each has `question`, `answer`, an integer, and
`expression`, whose value that is. Everything is drawn from the seed; a finished OUT is left as it is.
"""

import argparse
import json
import random
import sys
from pathlib import Path

THINGS = ("screws", "tiles", "bricks", "seeds", "beads", "coins", "sheets", "bottles", "candles", "cables")
PLACES = ("warehouse", "shop", "workshop", "depot", "factory", "yard")


def draw_problem(rng: random.Random) -> dict[str, str]:
    """`boxes` of `each`, some more, some taken away, and shared out evenly: two to four operations."""
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    boxes, each = rng.randint(12, 480), rng.randint(17, 960)
    text = f"A {place} has {boxes} boxes of {each} {thing}."
    expression, total = f"{boxes}*{each}", boxes * each
    if rng.random() < 0.7:
        more = rng.randint(100, 9999)
        text += f" {more} more {thing} are delivered."
        expression, total = f"{expression}+{more}", total + more
    if rng.random() < 0.7:
        sold = rng.randint(1, total - 1)
        text += f" Then {sold} of them are sold."
        expression, total = f"{expression}-{sold}", total - sold
    if rng.random() < 0.5:
        people = rng.randint(3, 40)
        text += f" The rest is shared out evenly among {people} people, as far as it goes. How many does each get?"
        expression, total = f"({expression})//{people}", total // people
    else:
        text += f" How many {thing} are there now?"
    return {"question": text, "expression": expression, "answer": str(total)}


def draw_problems(rng: random.Random, count: int, taken: set[str]) -> list[dict[str, str]]:
    """`count` problems whose questions are not in `taken`, which grows by them."""
    problems: list[dict[str, str]] = []
    while len(problems) < count:
        problem = draw_problem(rng)
        if problem["question"] not in taken:
            taken.add(problem["question"])
            problems.append(problem)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/tools"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=8192)
    parser.add_argument("--eval", type=int, default=256)
    args = parser.parse_args()
    out: Path = args.out
    if (out / "eval.jsonl").exists():
        print(f"{out} is ready")
        return 0
    rng, taken = random.Random(args.seed), set[str]()
    out.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", args.train), ("eval", args.eval)):  # eval last: it says that the folder is complete
        lines = [json.dumps(problem) + "\n" for problem in draw_problems(rng, count, taken)]
        (out / f"{name}.jsonl").write_text("".join(lines))
    print(f"{out}: {args.train} problems to train on, {args.eval} to evaluate on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
