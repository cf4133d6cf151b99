"""Imports point down, and what must start fast loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "databus": {"databus"},
    "rewards": {"rewards"},
    "rollout": {"rollout", "databus", "rewards"},
    "learner": {"learner", "databus"},
    "echelon": {"echelon", "rollout", "learner", "databus", "rewards"},
}
HEAVY = {"torch", "vllm", "transformers", "datasets", "wandb"}
HEAVY_FREE_PACKAGES = ("databus", "rewards")
VLLM_INTERNALS_MAX = 9
CONFIGURATION = ("databus.config", "rewards.config", "rollout.config", "learner.config", "echelon.config")
BROKER = "echelon.roles.broker"
MARK = "loaded:"


def imports_of(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return names


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    for file in sources(package):
        ours = {name.partition(".")[0] for name in imports_of(file)} & MAY_IMPORT.keys()
        assert ours <= MAY_IMPORT[package], f"{file} imports {ours - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", HEAVY_FREE_PACKAGES)
def test_light_packages_name_nothing_heavy(package: str) -> None:
    for file in sources(package):
        heavy = {name.partition(".")[0] for name in imports_of(file)} & HEAVY
        assert not heavy, f"{file} imports {heavy}"


def test_vllm_is_touched_in_few_modules() -> None:
    files = [file for package in MAY_IMPORT for file in sources(package)]
    touching = [file for file in files if any(name.partition(".")[0] == "vllm" for name in imports_of(file))]
    assert all(file.is_relative_to(ROOT / "rollout" / "engine") for file in touching)
    assert len(touching) <= VLLM_INTERNALS_MAX, touching


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded once it has run `code`."""
    code += f"\nimport sys; print({MARK!r}, *{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stdout.partition(MARK)[2].split())


def modules_of(package: str) -> list[str]:
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sources(package)]


@pytest.mark.parametrize("package", HEAVY_FREE_PACKAGES)
def test_light_packages_load_nothing_heavy(package: str) -> None:
    modules = [name.removesuffix(".__init__") for name in modules_of(package)]
    assert not loaded_after(f"import {', '.join(modules)}") & HEAVY


def test_configuration_loads_nothing_heavy() -> None:
    assert not loaded_after(f"import {', '.join(CONFIGURATION)}") & HEAVY


def test_broker_role_loads_nothing_heavy() -> None:
    assert not loaded_after(f"import {BROKER}") & HEAVY


def test_supervisor_loads_nothing_heavy() -> None:
    assert not loaded_after("import echelon.commands.run, echelon.commands.watch") & HEAVY


def test_the_services_client_and_command_load_nothing_heavy() -> None:
    """A key that others can read, or a host without one, is said before torch is loaded."""
    assert not loaded_after("import rollout.service.client, echelon.commands.serve") & HEAVY


def test_audit_loads_nothing_heavy() -> None:
    """Replay compares in a process without torch; the ranks that it starts have it."""
    assert not loaded_after("import echelon.commands.audit, echelon.commands.replay") & HEAVY


def test_plan_loads_nothing_heavy() -> None:
    assert not loaded_after("import echelon.commands.plan") & HEAVY


def test_help_loads_nothing_but_argparse() -> None:
    code = "from echelon.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    loaded = loaded_after(code)
    assert not loaded & (HEAVY | {"rich", "zmq", "numpy", "msgspec", "psutil", "asyncio"})
    assert "argparse" in loaded
