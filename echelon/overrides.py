"""`section.key=value` from the command line, typed by the setting that it names."""

from collections.abc import Sequence
from typing import Any

import msgspec

from echelon.config import RunConfig
from echelon.settings import (
    TAG,
    Settings,
    all_settings,
    describe,
    is_allowed,
    names_in,
    parse_value,
    to_config,
    unknown_setting,
)


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The configuration with `overrides` applied in order.

    Raises: ValueError, in one line: what was given, where, and what is allowed.
    """
    values = msgspec.to_builtins(config)
    settings = all_settings()
    for override in overrides:
        name, value = parse_override(override, settings)
        *sections, key = name.split(".")
        target = values
        for section in sections:
            target = target[section]
        if key == TAG and target.get(TAG) != value:
            target.clear()  # the settings of another variant
        target[key] = value
    return to_config(values, "settings")


def parse_override(override: str, settings: Settings) -> tuple[str, Any]:
    """(name, value) of one override. Raises: ValueError."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not a setting: expected section.key=value, such as learner.lr=1e-5")
    node = settings.get(name)
    if node is None:
        raise _no_such_setting(name, override, settings)
    try:
        value = parse_value(text, node)
    except ValueError:
        value = None
    if value is None or not is_allowed(value, node):
        raise ValueError(f"{name}={text}: expected {describe(node)}")
    return name, value


def _no_such_setting(name: str, override: str, settings: Settings) -> ValueError:
    inside = names_in(name, settings) if name else []
    if inside:
        return ValueError(f"{override!r} names a section: set one of its keys, {', '.join(inside)}")
    return unknown_setting(name, override, settings)
