"""What `prepare` refuses, and what it writes; it runs in this process, on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from echelon.config import DataConfig, RunConfig
from echelon.overrides import apply_overrides
from echelon.recipe import Recipe
from echelon.roles.prepare import prepare
from echelon.run_folder import RunFolder

ROWS = [{"question": f"{a}+{a + 1}=", "answer": str(2 * a + 1)} for a in range(1, 5)]
OVERRIDES = ("rollout.engine=small", "rollout.context_tokens=64", "rollout.max_tokens=16", "data.prompt={question}")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}#"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def make_folder(tmp_path: Path, model: Path, train: str | Path, *overrides: str) -> RunFolder:
    config = RunConfig(model=str(model), data=DataConfig(train=str(train)))
    (tmp_path / "mine.py").write_text("def reward(sample):\n    return 1.0\n")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    recipe = Recipe(path=tmp_path / "mine.py", config=apply_overrides(config, [*OVERRIDES, *overrides]))
    with folder.locked():
        folder.claim(recipe, resume=False)
    return folder


def stored(file: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in file.read_bytes().splitlines()]


def error(tmp_path: Path, model: Path, train: str | Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        prepare(make_folder(tmp_path, model, train, *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompts_are_written(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    evals = write_rows(tmp_path / "eval.jsonl", ROWS[:2])
    folder = make_folder(tmp_path, tiny_model, train, "eval.every=1", f"data.eval={evals}", "data.max_train=3")
    prepare(folder)
    lines = stored(folder.train_prompts)
    assert [line["problem"] for line in lines] == ROWS[:3]
    assert lines[0]["prompt"] == "1+2="
    assert lines[0]["prompt_ids"] == [4, 13, 5, 14]  # the character's place in the tokenizer of conftest.py
    assert len(stored(folder.eval_prompts)) == 2
    assert (folder.tokenizer / "tokenizer.json").is_file()


def test_parquet(tmp_path: Path, tiny_model: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
    folder = make_folder(tmp_path, tiny_model, tmp_path / "train.parquet")
    prepare(folder)
    assert [line["problem"] for line in stored(folder.train_prompts)] == ROWS


def test_a_file_that_changes_is_read_anew(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    folder = make_folder(tmp_path, tiny_model, train)
    prepare(folder)
    write_rows(train, list(reversed(ROWS)))
    prepare(folder)
    assert stored(folder.train_prompts)[0]["problem"] == ROWS[-1]


def with_chat_template(tmp_path: Path, tiny_model: Path) -> Path:
    model = tmp_path / "chat_model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model


def test_chat_template(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = with_chat_template(tmp_path, tiny_model)
    folder = make_folder(tmp_path, model, train, "data.chat=true", "data.system=12")
    prepare(folder)
    assert stored(folder.train_prompts)[0]["prompt"] == "s:12;u:1+2=;#"


def test_tokenizer_without_chat_template(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    text = error(tmp_path, tiny_model, train, "data.chat=true")
    assert text == f"data.chat is true, but the tokenizer of model={tiny_model} has no chat template"


def test_prompt_longer_than_the_context(tmp_path: Path, tiny_model: Path) -> None:
    train = write_rows(tmp_path / "long.jsonl", [*ROWS, {"question": "1" * 70, "answer": "1"}])
    text = error(tmp_path, tiny_model, train)
    assert "data.train: the prompt of row 5 has 70 tokens" in text
    assert "rollout.context_tokens=64" in text


def test_context_longer_than_the_model(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    text = error(tmp_path, tiny_model, train, "rollout.context_tokens=4096")
    assert f"rollout.context_tokens is 4096, but model={tiny_model} has 512 positions" in text


def test_template_field_that_rows_do_not_have(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    text = error(tmp_path, tiny_model, train, "data.prompt={prompt}")
    assert (
        text == "data.prompt names the field {prompt}, which data.train does not have: its fields are question, answer"
    )


@pytest.mark.parametrize("template", ["{question", "{}", "{question!x}", "{question.x}", "{question[9]}"])
def test_malformed_template(tmp_path: Path, tiny_model: Path, train: Path, template: str) -> None:
    assert "data.prompt" in error(tmp_path, tiny_model, train, f"data.prompt={template}")


def test_empty_prompt(tmp_path: Path, tiny_model: Path) -> None:
    train = write_rows(tmp_path / "empty_row.jsonl", [{"question": "1"}, {"question": " "}])
    assert "data.train: row 2 gives an empty prompt" in error(tmp_path, tiny_model, train)


def test_empty_data_set(tmp_path: Path, tiny_model: Path) -> None:
    train = write_rows(tmp_path / "empty.jsonl", [])
    assert error(tmp_path, tiny_model, train) == f"data.train={train} has no rows"


def test_file_that_is_no_jsonl(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{'a': 1}\n")
    assert "bad.jsonl cannot be read" in error(tmp_path, tiny_model, tmp_path / "bad.jsonl")


def edited_model(tmp_path: Path, tiny_model: Path, **changes: Any) -> Path:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


def test_model_that_is_no_causal_lm(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model, model_type="vit", architectures=["ViTModel"])
    assert "is not a causal language model: its type is 'vit'" in error(tmp_path, model, train)


def test_model_that_nobody_knows(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model, model_type="no_such_type")
    assert f"model={model} cannot be loaded" in error(tmp_path, model, train)


def test_model_without_weights(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model)
    (model / "model.safetensors").unlink()
    assert "has no weights" in error(tmp_path, model, train)


def test_model_without_tokenizer(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model)
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert f"model={model} has no tokenizer" in error(tmp_path, model, train)


def test_tokenizer_of_another_model(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model, vocab_size=10)
    assert error(tmp_path, model, train) == (
        "data.train: the tokenizer gives token 14, but the model's vocabulary ends at 9: tokenizer and model do not "
        "belong together"
    )


def test_end_token_that_the_model_cannot_give(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    model = edited_model(tmp_path, tiny_model, eos_token_id=40)
    (model / "generation_config.json").unlink()
    prepare(make_folder(tmp_path, model, train))  # the tokenizer's own is within its vocabulary
    for file in model.glob("tokenizer*"):
        file.write_text(file.read_text().replace("<eos>", "<end>"))
    (model / "tokenizer_config.json").write_text(
        json.dumps(json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": None})
    )
    shutil.rmtree(tmp_path / "run")
    assert f"model={model}: its end token is 40, but its vocabulary ends at 31" in error(tmp_path, model, train)


def test_end_of_thinking_that_the_model_cannot_read(tmp_path: Path, tiny_model: Path) -> None:
    train = write_rows(tmp_path / "digits.jsonl", [{"question": "12"}])
    model = edited_model(tmp_path, tiny_model, vocab_size=14)
    budgets = ("rollout.reasoning.thinking_tokens=4", "rollout.reasoning.solution_tokens=4", "rollout.reasoning.end=##")
    assert error(tmp_path, model, train, *budgets).startswith("rollout.reasoning.end: the tokenizer gives token 16")


def test_reward_that_is_not_there(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    assert "has no function 'none'" in error(tmp_path, tiny_model, train, "reward.function=recipe.py:none")


def test_gpu_that_is_not_there(tmp_path: Path, tiny_model: Path, train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "rollout.device is cuda, but torch sees no GPU" in error(tmp_path, tiny_model, train, "rollout.device=cuda")


def test_budgets_are_counted_in_the_models_tokens(tmp_path: Path, tiny_model: Path, train: Path) -> None:
    budgets = (
        "rollout.reasoning.thinking_tokens=8",
        "rollout.reasoning.solution_tokens=6",
        "rollout.reasoning.end==;#",
    )
    says = error(tmp_path, tiny_model, train, *budgets)
    assert "rollout.max_tokens is 16, but thinking (8), its end '=;#' (3) and the solution (6) take 17 tokens" in says
