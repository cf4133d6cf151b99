import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from echelon.config import DataConfig, RunConfig
from echelon.overrides import apply_overrides
from echelon.recipe import Recipe
from echelon.run_folder import RunFolder

CONFIG = RunConfig(model="org/name", data=DataConfig(train="org/data"))


def make_recipe(tmp_path: Path, name: str = "mine", *overrides: str) -> Recipe:
    file = tmp_path / f"{name}.py"
    file.write_text("# a recipe\n")
    return Recipe(path=file, config=apply_overrides(CONFIG, overrides))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def claim(folder: RunFolder, recipe: Recipe, resume: bool = False) -> str:
    with folder.locked():
        return folder.claim(recipe, resume).run_id


def claim_error(folder: RunFolder, recipe: Recipe, resume: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        claim(folder, recipe, resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_is_written_down(folder: RunFolder, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "mine", "seed=7")
    run_id = claim(folder, recipe)
    assert folder.config() == recipe.config
    assert folder.recipe_file.read_text() == "# a recipe\n"
    assert (folder.record().run_id, folder.record().recipe) == (run_id, "mine")


def test_a_run_that_never_got_going_is_begun_anew(folder: RunFolder, tmp_path: Path) -> None:
    first = claim(folder, make_recipe(tmp_path))
    folder.error_file("prepare").write_text("{}")
    assert claim(folder, make_recipe(tmp_path)) != first
    assert not folder.error_file("prepare").exists()


def test_a_run_is_not_overwritten(folder: RunFolder, tmp_path: Path) -> None:
    claim(folder, make_recipe(tmp_path))
    folder.metrics_file.write_text('{"step":0}\n')
    assert "holds a run already: add --resume" in claim_error(folder, make_recipe(tmp_path))


def test_another_recipes_folder(folder: RunFolder, tmp_path: Path) -> None:
    claim(folder, make_recipe(tmp_path, "mine"))
    for resume in (False, True):
        text = claim_error(folder, make_recipe(tmp_path, "other"), resume)
        assert "belongs to recipe 'mine', not 'other'" in text


def test_a_folder_with_something_else_in_it(folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / "thesis.tex").touch()
    assert "is not empty and not a run's folder (it has thesis.tex)" in claim_error(folder, make_recipe(tmp_path))


def test_resume_keeps_the_run_id_and_takes_new_settings(folder: RunFolder, tmp_path: Path) -> None:
    first = claim(folder, make_recipe(tmp_path))
    folder.metrics_file.write_text('{"step":0}\n')
    assert claim(folder, make_recipe(tmp_path, "mine", "learner.steps=500"), resume=True) == first
    assert folder.config().learner.steps == 500


def test_resume_with_other_data_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    claim(folder, make_recipe(tmp_path))
    text = claim_error(folder, make_recipe(tmp_path, "mine", "seed=9"), resume=True)
    assert "with seed=9: the run was started with seed=0" in text
    assert folder.config().seed == 0


def test_nothing_to_resume(folder: RunFolder, tmp_path: Path) -> None:
    assert "nothing to resume" in claim_error(folder, make_recipe(tmp_path), resume=True)


def test_a_folder_in_use_names_who_uses_it(folder: RunFolder) -> None:
    code = (
        "import sys; from echelon.run_folder import RunFolder\n"
        f"with RunFolder({str(folder.path)!r}).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert folder.is_in_use()
        with pytest.raises(ValueError, match=f"is in use by pid {holder.pid}"), folder.locked():
            pass
        os.kill(holder.pid, signal.SIGKILL)  # no clean-up: the kernel lets go
        holder.wait(10)
        assert not folder.is_in_use()
        with folder.locked():
            assert folder.is_in_use()
    finally:
        holder.kill()
        holder.communicate()


def test_what_is_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run's folder: it has no config\.json"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        RunFolder(tmp_path).config()
