"""What the documentation tells a user to type is taken by the command line, and what it points at is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from echelon.cli import parse
from echelon.overrides import parse_override
from echelon.recipe import load_recipe
from echelon.reference import reference
from echelon.settings import all_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "recipes/*.md")
    for page in ROOT.glob(pattern)
    if page.name not in ("CHANGELOG.md",)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
PLACEHOLDERS = {"…", "..."}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command in a fenced block that starts with `echelon`, `make` or `python`."""
    text = page.read_text()
    blocks = "\n".join(FENCED.findall(text)).replace("\\\n", " ")
    for line in blocks.splitlines():
        line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if (
            re.match(r"(echelon (?!\()[a-z]|make [a-z]|python (-m )?[a-z])", line)
            and "  " not in line.split("#")[0].strip()
        ):
            words = shlex.split(line, comments=True)
            if not PLACEHOLDERS & set(words) and not any(word[:1] in "[<|&" for word in words):
                yield words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} points at {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        match words:
            case ["echelon", *arguments]:
                check_echelon(arguments)
            case ["make", target, *_]:
                assert target in targets, words
            case ["python", "-m", module, *_]:
                assert module.partition(".")[0] in ("pip", "pytest", "pyright", "echelon"), words
            case ["python", file, *_]:
                assert (ROOT / file).is_file(), words


def check_echelon(arguments: list[str]) -> None:
    args = parse(arguments)
    if args.command != "run":
        return
    recipe = ROOT / args.recipe
    if recipe.is_file():
        load_recipe(str(recipe), args.overrides)
    else:  # a stand-in for the user's own
        assert args.recipe.lower() in ("recipe.py", "recipe"), arguments
        for override in args.overrides:
            parse_override(override, all_settings())


def test_there_are_commands_to_check() -> None:
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) >= 30
    assert {words[1] for words in found if words[0] == "echelon"} >= {"run", "worker", "audit", "replay", "report"}


def test_a_wrong_command_is_seen() -> None:
    with pytest.raises(ValueError, match="unknown setting"):
        check_echelon(["run", "recipes/grpo_chain_sum.py", "learner.rate=1"])
    with pytest.raises(SystemExit):
        check_echelon(["audit", "RUN_DIR", "--yaml"])


def test_reference_of_settings_is_of_these_settings() -> None:
    """If not: python -m echelon.reference > docs/reference/settings.md"""
    assert (ROOT / "docs/reference/settings.md").read_text() == reference()
