import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import make_groups

from databus.messages import Position
from learner import checkpoint_folder
from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.checkpoint_folder import (
    TrainerState,
    latest_checkpoint,
    list_checkpoints,
    oldest_checkpoint,
    read_trainer_state,
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
    with pytest.raises(ValueError, match="is damaged") as raised:
        load_checkpoint(path, *fresh(tiny_model))
    assert "\n" not in str(raised.value)


def test_checkpoint_of_another_model_is_refused(
    saved: tuple[Path, PolicyModel, Any], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrower")
    with pytest.raises(ValueError, match="is of another model") as raised:
        load_checkpoint(saved[0], *fresh(tmp_path / "narrower"))
    assert "\n" not in str(raised.value)
