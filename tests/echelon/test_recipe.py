from pathlib import Path

import pytest

from echelon.recipe import load_recipe

HEADER = "from echelon.config import *\nfrom learner.config import *\nfrom rewards.config import *\n"
REWARD = "def reward(sample):\n    return 1.0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')
    return tmp_path


def write(folder: Path, body: str, header: str = HEADER) -> Path:
    file = folder / "some_recipe.py"
    file.write_text(header + body)
    return file


def config_recipe(folder: Path, settings: str) -> Path:
    data = f"data=DataConfig(train={str(folder / 'train.jsonl')!r})"
    return write(folder, f"{REWARD}def recipe():\n    return RunConfig(model='org/name', {data}, {settings})\n")


def error(file: str | Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_recipe_and_overrides(folder: Path) -> None:
    recipe = load_recipe(config_recipe(folder, "seed=3, group_size=4"), ["group_size=6"])
    assert recipe.name == "some_recipe"
    assert (recipe.config.seed, recipe.config.group_size) == (3, 6)


def test_missing_file(tmp_path: Path) -> None:
    assert error(tmp_path / "none.py") == f"no such recipe: {tmp_path / 'none.py'}"


def test_not_a_script(tmp_path: Path) -> None:
    assert "expected a Python script" in error(tmp_path / "recipe.yaml")


def test_no_recipe_function(folder: Path) -> None:
    assert "has no function recipe()" in error(write(folder, "x = 1\n"))


def test_script_that_cannot_be_imported(folder: Path) -> None:
    assert "cannot be imported: ModuleNotFoundError" in error(write(folder, "import no_such_module\n"))
    text = error(write(folder, "def recipe(:\n"))
    assert "SyntaxError" in text
    assert "some_recipe.py:4" in text


def test_recipe_that_raises_names_the_line(folder: Path) -> None:
    text = error(write(folder, "def recipe():\n    return {}['x']\n"))
    assert "recipe() failed: KeyError: 'x'" in text
    assert "some_recipe.py:5" in text


def test_recipe_that_returns_something_else(folder: Path) -> None:
    assert "returned dict, expected RunConfig" in error(write(folder, "def recipe():\n    return {}\n"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("learner=LearnerConfig(lr=-1.0)", "learner.lr is -1.0, expected a number above 0"),
        ("learner=LearnerConfig(lr=float('nan'))", "learner.lr is nan, expected a number above 0"),
        ("seed='1'", "seed is '1', expected a whole number at least 0"),
        ("max_staleness=True", "max_staleness is True, expected a whole number at least 0"),
        ("stale_policy='keep'", "stale_policy is 'keep', expected drop or mask or requeue"),
        ("learner=RewardConfig()", "unknown setting 'learner.function'"),
        ("learner=None", "unknown setting 'learner'"),
        ("watchdog_s=object()", "a setting is a object, which no setting can be"),
    ],
)
def test_bad_value_names_file_and_key(folder: Path, settings: str, expected: str) -> None:
    file = config_recipe(folder, settings)
    text = error(file)
    assert text.startswith(str(file))
    assert expected in text


def test_a_path_is_as_good_as_its_text(folder: Path) -> None:
    file = write(
        folder,
        "def recipe():\n    return RunConfig(model=Path(__file__).parent, data=DataConfig(train='x/y'))\n",
        HEADER + "from pathlib import Path\n",
    )
    assert load_recipe(file).config.model == str(folder)


def test_paths_that_exist_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    file = write(
        folder, "def recipe():\n    return RunConfig(model='org/name', data=DataConfig(train='train.jsonl'))\n"
    )
    config = load_recipe(file).config
    assert config.data.train == str(folder / "train.jsonl")
    assert config.model == "org/name"


def test_reward_of_the_recipe_is_found_in_its_copy(folder: Path) -> None:
    file = config_recipe(folder, "reward=RewardConfig(function=f'{__file__}:reward')")
    assert load_recipe(file).config.reward.function == "recipe.py:reward"


def test_reward_of_another_file_becomes_absolute(folder: Path) -> None:
    (folder / "mine.py").write_text(REWARD)
    file = config_recipe(folder, "reward=RewardConfig(function='mine.py:reward')")
    assert load_recipe(file).config.reward.function == f"{folder / 'mine.py'}:reward"


def test_an_advantage_function_is_found_like_a_reward(folder: Path) -> None:
    (folder / "mine.py").write_text("def weighted(group):\n    return group.rewards\n")
    own = config_recipe(folder, "learner=LearnerConfig(advantage=AdvantageConfig(estimator=__file__ + ':reward'))")
    assert load_recipe(own).config.learner.advantage.estimator == "recipe.py:reward"
    estimator = load_recipe(own, ["learner.advantage.estimator=mine.py:weighted"]).config.learner.advantage.estimator
    assert estimator == f"{folder}/mine.py:weighted"
    assert "'ppo': expected grpo, dr_grpo" in error(own, "learner.advantage.estimator=ppo")
    assert "learner.advantage.estimator='none.py:f': no such file" in error(
        own, "learner.advantage.estimator=none.py:f"
    )


def test_sampling_that_biases_the_ratio_is_refused_with_the_reason(folder: Path) -> None:
    file = config_recipe(folder, "rollout=RolloutConfig(top_p=0.9)")
    file.write_text("from rollout.config import *\n" + file.read_text())
    assert "there is no top_p: tokens would be sampled from another distribution" in error(file)


def test_reward_file_that_is_missing(folder: Path) -> None:
    assert "no such file" in error(config_recipe(folder, "reward=RewardConfig(function='none.py:reward')"))


def test_loading_leaves_no_module_behind(folder: Path) -> None:
    import sys

    before = set(sys.modules)
    load_recipe(config_recipe(folder, ""))
    assert not {name for name in set(sys.modules) - before if "recipe" in name}
