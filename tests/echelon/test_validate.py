from pathlib import Path

import msgspec
import pytest

from echelon import validate as module
from echelon.config import DataConfig, RunConfig
from echelon.overrides import apply_overrides
from echelon.validate import check_machine, validate

CONFIG = RunConfig(model="org/name", data=DataConfig(train="org/data"))
CUDA = ["learner.device=cuda", "rollout.device=cuda"]


def error(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        validate(apply_overrides(CONFIG, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_consistent() -> None:
    validate(CONFIG)
    with pytest.raises(ValueError, match="group_size"):  # so that it is known to look
        validate(apply_overrides(CONFIG, ["group_size=100000"]))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["rollout.max_tokens=2048"], ["rollout.max_tokens", "rollout.context_tokens"]),
        (["eval.max_tokens=4000"], ["eval.max_tokens", "rollout.context_tokens"]),
        (["rollout.reasoning.thinking_tokens=600"], ["rollout.max_tokens", "rollout.reasoning.thinking_tokens"]),
        (
            ["rollout.reasoning.thinking_tokens=400", "eval.max_tokens=900"],
            ["eval.max_tokens", "rollout.reasoning.thinking_tokens", "solution_tokens"],
        ),
        (["rollout.max_sequences=4"], ["group_size", "rollout.max_sequences"]),
        (["eval.every=5"], ["eval.every", "data.eval"]),
        (["learner.betas=0.9,1.0"], ["learner.betas"]),
        (
            ["placement=colocated", "learner.device=cuda"],
            ["placement", "learner.device is cuda", "rollout.device cpu", "separate"],
        ),
        (["learner.keep_best=1", "learner.checkpoint_every=5"], ["learner.keep_best", "eval.every=0"]),
        (
            ["learner.keep_best=1", "learner.checkpoint_every=10", "eval.every=11", "data.eval=org/data"],
            ["learner.keep_best", "learner.checkpoint_every=10", "eval.every=11", "multiple"],
        ),
        (["bus.heartbeat_s=20"], ["bus.peer_timeout_s", "bus.heartbeat_s"]),
        (["bus.address=tcp://0.0.0.0:5555", "bus.plain=true"], ["bus.address", "bus.keys", "bus.plain=false"]),
        (["bus.address=udp://127.0.0.1:5555"], ["bus.address", "tcp://HOST:PORT"]),
        (["weights.backend=shm", "bus.address=tcp://127.0.0.1:*"], ["weights.backend", "bus.address", "bus or file"]),
        (["weights.backend=nccl"], ["weights.backend is nccl", "learner.device is cpu", "cuda"]),
        (
            ["weights.backend=ipc", "learner.device=cuda"],
            ["weights.backend is ipc", "rollout.device is cpu"],
        ),
        (
            ["weights.backend=nccl", *CUDA, "placement=colocated"],
            ["weights.backend is nccl", "placement=colocated", "shm or bus"],
        ),
        (
            ["weights.backend=ipc", *CUDA, "bus.address=tcp://127.0.0.1:*"],
            ["weights.backend is ipc", "one machine", "nccl or bus"],
        ),
        (["weights.folder=/tmp"], ["weights.folder", "weights.backend=file"]),
        (["weights.backend=file", "weights.folder=/no/such/folder"], ["weights.folder", "no such folder"]),
        (["scheduling.shares=0.5,0.5,0.5"], ["scheduling.shares", "add up to 1"]),
        (
            ["scheduling.curriculum.type=drop_solved", "data.shuffle=false"],
            ["scheduling.curriculum", "scheduling.mixing", "data.shuffle"],
        ),
        (
            ["scheduling.curriculum.type=pass_rate_band", "scheduling.curriculum.low=0.9"],
            ["scheduling.curriculum.low", "high"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(overrides: list[str], names: list[str]) -> None:
    text = error(*overrides)
    assert all(name in text for name in names)


def machine_error(**changes: str) -> str:
    data = msgspec.structs.replace(CONFIG.data, **{key[5:]: v for key, v in changes.items() if key.startswith("data_")})
    model = changes.get("model", CONFIG.model)
    with pytest.raises(ValueError) as caught:
        check_machine(msgspec.structs.replace(CONFIG, model=model, data=data))
    return str(caught.value)


def test_model_folder(tmp_path: Path) -> None:
    assert machine_error(model=str(tmp_path / "none")) == f"model={tmp_path / 'none'}: no such folder"
    assert "has no config.json" in machine_error(model=str(tmp_path))
    (tmp_path / "weights.bin").touch()
    assert "is a file" in machine_error(model=str(tmp_path / "weights.bin"))


def test_data_files(tmp_path: Path) -> None:
    assert machine_error(data_train=str(tmp_path / "x.jsonl")).endswith("no such file")
    assert machine_error(data_train="x.jsonl").endswith("no such file")
    assert "is a folder" in machine_error(data_eval=str(tmp_path))
    (tmp_path / "x.csv").touch()
    assert ".jsonl or .parquet" in machine_error(data_train=str(tmp_path / "x.csv"))
    assert "names no problems" in machine_error(data_train="")


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "rollout.engine is vllm, which is not installed: run `make setup`" in machine_error()
    check_machine(apply_overrides(CONFIG, ["rollout.engine=small"]))
