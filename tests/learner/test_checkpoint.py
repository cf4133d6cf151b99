import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_script import make_groups

from databus.messages import Position
from learner import checkpoint_folder
from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.checkpoint_folder import (
    DamagedCheckpoint,
    TrainerState,
    finish_checkpoint,
    kept_checkpoints,
    latest_checkpoint,
    list_checkpoints,
    oldest_checkpoint,
    read_trainer_state,
    start_checkpoint,
    step_of,
)
from learner.config import LearnerConfig
from learner.model import ModelOptions, PolicyModel, build_model
from learner.optimizer import build_optimizer
from learner.train_step import TrainStep

POSITION = Position(step=20, next_cursor=70, pending=((3, 1), (9, 2)), counts={"trained": 60, "stale": 4})
CONFIG = LearnerConfig(lr=1e-2)


def state_of(step: int) -> TrainerState:
    return TrainerState(step=step, model="some/model", world_size=1, position=POSITION)


def trained(model: Path, steps: int) -> tuple[PolicyModel, Any]:
    policy = build_model(model, ModelOptions())
    optimizer, scheduler = build_optimizer(policy.parameters(), CONFIG)
    train_step = TrainStep(policy, optimizer, scheduler, CONFIG)
    for step in range(steps):
        train_step(make_groups(step), step)
    return policy, optimizer


@pytest.fixture
def saved(single_rank: None, tiny_model: Path, tmp_path: Path) -> Iterator[tuple[Path, PolicyModel, Any]]:
    policy, optimizer = trained(tiny_model, 2)
    yield save(tmp_path, 20, policy, optimizer), policy, optimizer


def save(folder: Path, step: int, policy: PolicyModel, optimizer: Any, keep: int = 2) -> Path:
    return write_checkpoint(folder, state_of(step), state_tensors(policy.causal_lm, optimizer), keep)


def test_round_trip_is_exact(saved: tuple[Path, PolicyModel, Any], tiny_model: Path) -> None:
    path, policy, optimizer = saved
    other, other_optimizer = trained(tiny_model, 0)
    state = load_checkpoint(path, other.causal_lm, other_optimizer)
    assert (state.step, state.position) == (20, POSITION)
    pairs = zip(policy.parameters(), other.parameters(), strict=True)
    num_moments = 0
    for ours, theirs in pairs:
        assert torch.equal(whole(ours), whole(theirs))
        for name, value in optimizer.state[ours].items():
            assert torch.equal(whole(value), whole(other_optimizer.state[theirs][name]))
            num_moments += 1
    assert num_moments == 3 * 24  # step, exp_avg, exp_avg_sq


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_folder_is_complete_and_alone(saved: tuple[Path, PolicyModel, Any]) -> None:
    path, _, _ = saved
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000020"]
    content = json.loads((path / "trainer.json").read_text())
    assert content["position"]["next_cursor"] == 70
    assert {file["name"] for file in content["files"]} == {".metadata", "__0_0.distcp"}


def test_only_the_newest_are_kept(saved: tuple[Path, PolicyModel, Any]) -> None:
    path, policy, optimizer = saved
    assert oldest_checkpoint(path.parent) == 20
    assert oldest_checkpoint(path) == 0
    for step in (30, 1_000_000):
        save(path.parent, step, policy, optimizer)
    assert [kept.name for kept in list_checkpoints(path.parent)] == ["step-000030", "step-1000000"]
    assert oldest_checkpoint(path.parent) == 30
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["step-000030", "step-1000000"]


def test_same_step_again_replaces(saved: tuple[Path, PolicyModel, Any]) -> None:
    path, policy, optimizer = saved
    (path / "stray").touch()
    save(path.parent, 20, policy, optimizer)
    assert not (path / "stray").exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000020"]


@pytest.mark.parametrize("killed_in", ["_write_trainer_file", "_replace"])
def test_kill_while_saving_leaves_the_old_one(
    killed_in: str, saved: tuple[Path, PolicyModel, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, policy, optimizer = saved

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, killed_in, killed)
        with pytest.raises(KeyboardInterrupt):
            save(path.parent, 30, policy, optimizer, keep=1)
    assert (path.parent / "step-000030.tmp").is_dir()
    assert latest_checkpoint(path.parent) == path
    assert load_checkpoint(path, *fresh(tiny_model)).step == 20

    save(path.parent, 30, policy, optimizer, keep=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000030"]


def fresh(model: Path) -> tuple[Any, Any]:
    policy, optimizer = trained(model, 0)
    return policy.causal_lm, optimizer


def test_missing_is_one_line(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match=r"no complete checkpoint at .*: it has no trainer\.json") as raised:
        read_trainer_state(tmp_path)
    assert "\n" not in str(raised.value)


def flip_a_byte(path: Path) -> None:
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def remove_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def garble_trainer_file(path: Path) -> None:
    (path / "trainer.json").write_text('{"step": "twenty"}')


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, remove_metadata, garble_trainer_file])
def test_damage_is_one_line(damage: Any, saved: tuple[Path, PolicyModel, Any], tiny_model: Path) -> None:
    path, _, _ = saved
    damage(path)
    assert "is damaged: " in refusal(path, *fresh(tiny_model))


def refusal(checkpoint: Path, causal_lm: Any, optimizer: Any) -> str:
    """What is said, in one line; neither the checkpoint nor the model is touched."""
    weights = [whole(each).clone() for each in causal_lm.parameters()]
    files = {file: file.read_bytes() for file in checkpoint.parent.rglob("*") if file.is_file()}
    with pytest.raises(ValueError) as raised:
        load_checkpoint(checkpoint, causal_lm, optimizer)
    assert str(checkpoint) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(whole(now), then) for now, then in zip(causal_lm.parameters(), weights, strict=True))
    assert {file: file.read_bytes() for file in checkpoint.parent.rglob("*") if file.is_file()} == files
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"intermediate_size": 96}, r"down_proj\.weight is of shape \[64, 128\] there, of shape \[64, 96\] here$"),
        (
            {"vocab_size": 40},
            r"embed_tokens\.weight is of shape \[32, 64\] there, of shape \[40, 64\] here \(another voc",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
            r"it has model\.layers\.1\..*, which this one has not",
        ),
        ({"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]}, r"it has no model\.layers\.2\."),
        ({"tie_word_embeddings": False}, r"it has no lm_head\.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_model_is_refused(
    changes: dict[str, Any], said: str, saved: tuple[Path, PolicyModel, Any], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    assert re.search(f"is of another model: .*{said}", refusal(saved[0], *fresh(tmp_path / "other")))


def test_checkpoint_of_another_optimizer_is_refused(saved: tuple[Path, PolicyModel, Any], tiny_model: Path) -> None:
    policy = build_model(tiny_model, ModelOptions())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9)
    said = refusal(saved[0], policy.causal_lm, optimizer)
    assert re.search(r"is of another optimizer: it has .*exp_avg, which this one has not", said)


def test_what_to_do_about_a_damaged_one(saved: tuple[Path, PolicyModel, Any], tiny_model: Path) -> None:
    path, policy, optimizer = saved
    newest = save(path.parent, 30, policy, optimizer)
    flip_a_byte(newest)
    with pytest.raises(DamagedCheckpoint) as raised:
        load_checkpoint(newest, *fresh(tiny_model))
    said = (
        f"checkpoint {newest} is damaged: the contents of __0_0.distcp have changed; remove that folder to go on from"
    )
    assert raised.value.advised() == f"{said} step-000020"
    flip_a_byte(path)
    with pytest.raises(DamagedCheckpoint) as raised:
        load_checkpoint(path, *fresh(tiny_model))
    assert raised.value.advised().endswith("have changed; there is none before it to go on from")


def evaluated(folder: Path, step: int, accuracies: dict[int, float | None], keep_best: int = 1) -> tuple[list, list]:
    """Steps of the newest and of the best checkpoints once this one is written, two of the newest being kept."""
    (start_checkpoint(folder, step) / "weights").touch()
    position = msgspec.structs.replace(POSITION, step=step, accuracies=accuracies)
    state = TrainerState(step=step, model="m", world_size=1, position=position)
    finish_checkpoint(folder, state, keep=2, keep_best=keep_best)
    return [step_of(path) for path in list_checkpoints(folder)], [
        step_of(path) for path in list_checkpoints(folder / "best")
    ]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    accuracies: dict[int, float | None] = {0: 0.1, 10: 0.3}
    for step in (10, 20):
        evaluated(tmp_path, step, accuracies)
    assert evaluated(tmp_path, 30, accuracies | {20: None}) == ([20, 30], [10])
    accuracies |= {20: 0.5, 30: None}
    assert evaluated(tmp_path, 40, accuracies) == ([30, 40], [20])
    accuracies |= {30: 0.5, 40: 0.2}
    assert evaluated(tmp_path, 50, accuracies) == ([40, 50], [30]), "of equals the newer"
    assert evaluated(tmp_path, 60, accuracies | {50: None}) == ([50, 60], [30]), "worse than the best"
    assert evaluated(tmp_path, 70, accuracies | {50: None}) == ([60, 70], [30, 50]), "perhaps it is the best"
    assert evaluated(tmp_path, 80, accuracies | {50: 0.4}) == ([70, 80], [30]), "it was not, and 60 was not evaluated"
    assert [step_of(path) for path in kept_checkpoints(tmp_path)] == [30, 70, 80]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000080"
    assert oldest_checkpoint(tmp_path) == 70, "the journal need not reach back to the best"


def test_as_many_best_ones_as_asked_for(tmp_path: Path) -> None:
    accuracies: dict[int, float | None] = {10: 0.3, 20: 0.1, 30: 0.2, 40: 0.0}
    for step in (10, 20, 30, 40, 50):
        evaluated(tmp_path, step, accuracies, keep_best=2)
    assert evaluated(tmp_path, 60, accuracies, keep_best=2) == ([50, 60], [10, 30])
    assert evaluated(tmp_path, 70, accuracies, keep_best=0) == ([60, 70], [10, 30]), "what there is stays"
    (tmp_path / "best" / "step-000010.tmp").mkdir()
    assert evaluated(tmp_path, 80, accuracies, keep_best=5) == ([70, 80], [10, 30])
    assert not (tmp_path / "best" / "step-000010.tmp").exists()
