"""All of our packages must come from one checkout: a mixture of two would fail late and strangely."""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("databus", "rewards", "rollout", "learner", "echelon")


def package_root() -> Path:
    """The folder that all our packages lie in. Imports none of them.

    Raises: ValueError, in one line, where one is missing or comes from elsewhere.
    """
    places = {name: _folder(name, find_spec(name)) for name in PACKAGES}
    root = places["echelon"].parent
    for name, folder in places.items():
        if folder.parent != root:
            raise ValueError(
                f"package {name!r} comes from {folder.parent}, echelon from {root}: "
                f"install one checkout only, and leave no folder {name!r} where python looks first"
            )
    return root


def _folder(name: str, spec: ModuleSpec | None) -> Path:
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {name!r} cannot be found: run echelon from its own checkout")
    return Path(next(iter(spec.submodule_search_locations))).resolve()
