from pathlib import Path

import pytest

from databus.keys import KEY_HOLDERS, client_keys, server_keys
from echelon.cli import BAD_INPUT, OK, main
from echelon.recipe import load_recipe

RECIPE = """
from echelon.config import DataConfig, RunConfig
def recipe():
    return RunConfig(model="org/name", data=DataConfig(train="org/data"))
"""


def test_new_keys_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", "new", str(folder)]) == OK
    assert "worker.key, observer.key, broker.pub, learner.pub" in capsys.readouterr().out
    assert sorted(file.stem for file in folder.glob("*.key")) == sorted(KEY_HOLDERS)
    assert client_keys(folder, "worker").own.public in server_keys(folder, "broker").allowed
    assert main(["keys", "new", str(folder)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "never overwritten" in error and error.count("\n") == 1


def test_folder_of_keys_is_named_absolutely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Roles and workers read the configuration from other folders."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.py"
    recipe.write_text(RECIPE)
    settings = ["bus.address=tcp://0.0.0.0:5555", "bus.keys=mine"]
    assert load_recipe(recipe, settings).config.bus.keys == str(tmp_path / "mine")
    assert load_recipe(recipe, settings[:1]).config.bus.keys == "auto"


def test_run_with_keys_that_are_missing_ends_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.py"
    recipe.write_text(RECIPE)
    words = ["run", str(recipe), "--run-dir", str(tmp_path / "run"), "bus.address=tcp://0.0.0.0:5555"]
    assert main([*words, f"bus.keys={tmp_path / 'none'}", "rollout.engine=small"]) == BAD_INPUT
    assert "broker.key cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
