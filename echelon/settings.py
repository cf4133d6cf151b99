"""Every setting of a run by its dotted name, with its type and bounds: one check for recipes and overrides."""

import difflib
import json
import math
from typing import Any

import msgspec
from msgspec import inspect

from echelon.config import RunConfig
from rollout.config import why_not_sampling

TAG = "type"
"""The key that says which variant of a section it is."""

Settings = dict[str, inspect.Type]


def all_settings() -> Settings:
    """`learner.lr` -> its type, for all settings, in the order of their definition.

    A section that comes in variants has the settings of all of them, and `type`, which chooses one.
    """
    settings: Settings = {}
    _collect(inspect.type_info(RunConfig), "", settings)
    return settings


def _collect(node: inspect.Type, name: str, settings: Settings) -> None:
    if isinstance(node, inspect.UnionType):
        settings[f"{name}.{TAG}"] = inspect.LiteralType(tuple(_variants(node)))
        for variant in _variants(node).values():
            _collect(variant, name, settings)
    elif not isinstance(node, inspect.StructType):
        settings[name] = node
    else:
        for field in node.fields:
            _collect(field.type, f"{name}.{field.name}" if name else field.name, settings)


def _variants(node: inspect.Type) -> dict[str, inspect.StructType]:
    """The variants of a section by their `type`; none where it has none."""
    structs = node.types if isinstance(node, inspect.UnionType) else ()
    return {str(each.tag): each for each in structs if isinstance(each, inspect.StructType)}


def _check_variants(node: inspect.Type, values: Any, name: str, source: str) -> None:
    """Raises: ValueError for a setting of a variant that was not chosen."""
    if isinstance(node, inspect.StructType) and isinstance(values, dict):
        for field in node.fields:
            inner = f"{name}.{field.name}" if name else field.name
            _check_variants(field.type, values.get(field.name), inner, source)
    variants = _variants(node)
    if not variants or not isinstance(values, dict) or values.get(TAG) not in variants:
        return
    allowed = [field.name for field in variants[values[TAG]].fields]
    for key in values.keys() - {TAG, *allowed}:
        raise ValueError(
            f"{source}: {name}.{key} is not a setting of {name}.{TAG}={values[TAG]} "
            f"(it has {', '.join(allowed) or 'none'}): set {name}.{TAG} first"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def parse_value(text: str, node: inspect.Type) -> Any:
    """What was written on a command line, as the setting's type. Raises: ValueError without a text."""
    match node:
        case inspect.BoolType():
            return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _refuse()
        case inspect.IntType():
            return int(text)
        case inspect.FloatType():
            return float(text)
        case inspect.TupleType(item_types=items):
            parts = text.strip("()[] ").split(",")
            if len(parts) != len(items):
                raise ValueError
            return tuple(parse_value(part.strip(), item) for part, item in zip(parts, items, strict=True))
        case inspect.VarTupleType(item_type=inspect.StructType()):
            return json.loads(text)
        case inspect.VarTupleType(item_type=item):
            return tuple(parse_value(part.strip(), item) for part in text.strip("()[] ").split(","))
        case _:
            return text


def is_allowed(value: Any, node: inspect.Type) -> bool:
    """Is `value` of the setting's type, and within its bounds?"""
    match node:
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool) and _within(value, node)
        case inspect.FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool) and _within(value, node)
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.LiteralType(values=values):
            return value in values
        case inspect.TupleType(item_types=items):
            if not isinstance(value, list | tuple) or len(value) != len(items):
                return False
            return all(is_allowed(part, item) for part, item in zip(value, items, strict=True))
        case inspect.VarTupleType(item_type=item):
            is_list = isinstance(value, list | tuple) and (len(value) > 0 or isinstance(item, inspect.StructType))
            return is_list and all(part != "" and is_allowed(part, item) for part in value)
        case inspect.StructType(fields=fields):
            known = {field.name: field.type for field in fields}
            needed = {field.name for field in fields if field.required}
            if not isinstance(value, dict) or not needed <= value.keys() <= known.keys():
                return False
            return all(is_allowed(value[name], known[name]) for name in value)
    raise AssertionError(f"a setting of type {type(node).__name__}: teach echelon.settings about it")


def describe(node: inspect.Type) -> str:
    """What is allowed, in words."""
    match node:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"a whole number{_bounds(node)}"
        case inspect.FloatType():
            return f"a number{_bounds(node)}"
        case inspect.LiteralType(values=values):
            return " or ".join(sorted(map(str, values)))
        case inspect.TupleType(item_types=items):
            return f"{len(items)} values with commas between them, each {describe(items[0])}"
        case inspect.VarTupleType(item_type=item):
            if isinstance(item, inspect.StructType):
                return f"a list, as JSON, each {describe(item)}"
            return f"one value or more, with commas between them, each {describe(item)}"
        case inspect.StructType(fields=fields):
            return f"of {', '.join(f'{field.name} ({describe(field.type)})' for field in fields)}"
    return "text"


def unknown_setting(name: str, given: str, settings: Settings) -> ValueError:
    """One line: what was given, the nearest name, the names that are allowed there."""
    section, _, leaf = name.rpartition(".")
    siblings = names_in(section, settings)
    if not siblings:
        section, siblings = "", names_in("", settings)
    nearest = _nearest(name, leaf, settings)
    hint = f"; did you mean {nearest}?" if nearest else ""
    where = f"{section} has" if section else "allowed are"
    allowed = f" ({where}: {', '.join(siblings)})"
    return ValueError(f"unknown setting {name!r} in {given!r}{why_not_sampling(leaf) or hint + allowed}")


def names_in(section: str, settings: Settings) -> list[str]:
    """Names directly below a section ("" for the top), sections themselves as `name.*`."""
    prefix = f"{section}." if section else ""
    names: dict[str, None] = {}
    for name in settings:
        if name.startswith(prefix):
            head, dot, _ = name[len(prefix) :].partition(".")
            names[f"{head}.*" if dot else head] = None
    return list(names)


def _nearest(name: str, leaf: str, settings: Settings) -> str | None:
    """The same key in another section, a like one in the same section, or a like one anywhere."""
    section = name.rpartition(".")[0]
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in settings}
    inside = {key: found for key, found in leaves.items() if found.rpartition(".")[0] == section}
    close = difflib.get_close_matches(leaf, inside, n=1) or difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    return leaves[leaf] if leaf in leaves else next((leaves[key] for key in close), None)


def _within(value: float, node: inspect.IntType | inspect.FloatType) -> bool:
    return (
        math.isfinite(value)
        and (node.gt is None or value > node.gt)
        and (node.ge is None or value >= node.ge)
        and (node.lt is None or value < node.lt)
        and (node.le is None or value <= node.le)
    )


def _bounds(node: inspect.IntType | inspect.FloatType) -> str:
    words = (("above", node.gt), ("at least", node.ge), ("below", node.lt), ("at most", node.le))
    bounds = [f"{word} {bound:g}" for word, bound in words if bound is not None]
    return " " + " and ".join(bounds) if bounds else ""


def _refuse() -> Any:
    raise ValueError


def to_config(values: dict[str, Any], source: str) -> RunConfig:
    """Check every value and build the configuration. Raises: ValueError naming `source` and the setting."""
    settings = all_settings()
    for name, value in flatten(values).items():
        if name not in settings:
            raise ValueError(f"{source}: {unknown_setting(name, f'{name}={value!r}', settings)}")
        if not is_allowed(value, settings[name]):
            raise ValueError(f"{source}: {name} is {value!r}, expected {describe(settings[name])}")
    _check_variants(inspect.type_info(RunConfig), values, "", source)
    try:
        return msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"{source}: {error}") from None
