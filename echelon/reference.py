"""`python -m echelon.reference`: the reference of settings, `docs/reference/settings.md`, from the structs."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.inspect import StructType, Type, UnionType, type_info

from echelon.config import RunConfig
from echelon.settings import TAG, describe

HEAD = """# Settings

Every setting of a run, as `echelon run RECIPE.py section.key=value` takes it and as recipes give it to `RunConfig`.
This page is made from the structs: `python -m echelon.reference > docs/reference/settings.md`.
"""


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *_section("", type_info(RunConfig))])


def _section(name: str, node: Type) -> Iterator[str]:
    """Of a struct: what it is for, its own settings, and then the sections below it."""
    if isinstance(node, UnionType):
        for each in node.types:
            if isinstance(each, StructType):
                yield from _struct(name, each, f"{name}.{TAG}={each.tag}")
    elif isinstance(node, StructType):
        yield from _struct(name, node, name or "RunConfig")


def _struct(name: str, node: StructType, title: str) -> Iterator[str]:
    own = [field for field in node.fields if not _is_section(field.type)]
    yield f"## `{title}`\n"
    yield f"```text\n{inspect.cleandoc(node.cls.__doc__ or '')}\n```\n"
    if own:
        yield "| setting | allowed | default |\n|---|---|---|"
        for field in own:
            default = _default(field)
            yield f"| `{_join(name, field.name)}` | {describe(field.type)} | {default} |".replace("  ", " ")
        yield ""
    for field in node.fields:
        if _is_section(field.type):
            yield from _section(_join(name, field.name), field.type)


def _is_section(node: Type) -> bool:
    if isinstance(node, UnionType):
        return any(isinstance(each, StructType) for each in node.types)
    return isinstance(node, StructType)


def _default(field: Any) -> str:
    if field.required:
        return "none: it must be given"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{msgspec.json.encode(value).decode()}`"


def _join(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


if __name__ == "__main__":
    sys.stdout.write(reference())
