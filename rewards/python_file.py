"""A user's Python file as a module, and what is wrong with it in one line."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_file(path: Path) -> ModuleType:
    """Run the file anew. Raises: ValueError, in one line, if it fails."""
    name = f"_echelon_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {describe(error, path)}") from error
    return module


def describe(error: BaseException, path: Path | None = None) -> str:
    """`Type: message (file:line)` in one line; the line is the last one inside `path` where there is one."""
    text = " ".join(str(error).split()) or "no message"
    place = _place(error, path)
    return f"{type(error).__name__}: {text}" + (f" ({place})" if place else "")


def _place(error: BaseException, path: Path | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames: list[tuple[str, int]] = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    inside = [frame for frame in frames if path is not None and frame[0] == str(path)]
    last = inside[-1:] or frames[-1:]
    return f"{last[0][0]}:{last[0][1]}" if last else ""
