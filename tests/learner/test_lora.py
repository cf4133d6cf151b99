"""Adapters are what is trained, published and saved; merged by workers they say what the learner says."""

import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CONFIGS, write_model
from learner_script import make_groups, train
from msgspec import structs
from peft import PeftModel
from safetensors.torch import load_file
from test_checkpoint import whole
from torch import Tensor
from transformers import AutoModelForCausalLM

from databus.messages import VersionPublished
from learner.adapter_snapshot import AdapterSnapshotter
from learner.checkpoint import load_checkpoint, state_tensors, write_checkpoint
from learner.checkpoint_folder import TrainerState, read_trainer_state
from learner.config import LearnerConfig, LoraConfig, LossConfig
from learner.export import export_checkpoint
from learner.lora import adapters_off, target_names
from learner.model import ModelOptions, PolicyModel, build_model, decoder_layers, hidden_matrices, num_trainable
from learner.optimizer import build_optimizer, resume_schedule
from learner.probe import score_probe
from learner.reference import build_reference
from learner.train_step import TrainStep
from learner.weights_out import WeightServer
from rollout.engine.expected import ExpectedTensors
from rollout.engine.tensors import tensors
from rollout.merging import MergingPull, merge
from rollout.weights_in import pull_snapshot

LORA = LoraConfig(rank=4, alpha=8.0)
CONFIG = LearnerConfig(steps=8, lr=3e-2, lora=LORA)
TEXTS = tuple(tuple((index * step) % 14 + 3 for index in range(30)) for step in (1, 3, 5))


def build(model: Path, config: LearnerConfig = CONFIG, **options: Any) -> tuple[PolicyModel, TrainStep, Any, Any]:
    torch.manual_seed(0)
    policy = build_model(model, ModelOptions(lora=config.lora, **options))
    optimizer, scheduler = build_optimizer(policy.parameters(), config, hidden_matrices(policy))
    reference = policy if config.loss.kl_coef > 0 else None
    return policy, TrainStep(policy, optimizer, scheduler, config, reference), optimizer, scheduler


def trained(model: Path, config: LearnerConfig = CONFIG, steps: int = 2, **options: Any) -> tuple[PolicyModel, Any]:
    policy, train_step, optimizer, _ = build(model, config, **options)
    for step in range(steps):
        train_step(make_groups(step), step)
    return policy, optimizer


def served(policy: PolicyModel, model: Path, dtype: str = "float32") -> dict[str, Tensor]:
    """What a worker makes of the version that the learner publishes, over a real socket."""
    assert policy.lora is not None
    snapshot = AdapterSnapshotter(policy.lora, rank=0).take(1)
    assert snapshot is not None
    with closing(WeightServer("ipc://unused", keep=1)) as server:
        server.publish(snapshot)
        merging = MergingPull(pull_snapshot, str(model), dtype)
        merged = merging(server.address, 1, snapshot.manifest.num_bytes, threading.Event())
    ExpectedTensors.of(str(model)).check(merged.manifest)
    weights = {name: tensor.clone() for name, tensor in tensors(merged.manifest, merged.map())}
    merged.close()
    return weights


@torch.no_grad()
def logprobs(causal_lm: Any) -> Tensor:
    """[3, 29], of `TEXTS`."""
    ids = torch.tensor(TEXTS)
    said = torch.log_softmax(causal_lm(ids).logits.float(), -1)
    return said[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def saved(folder: Path, policy: PolicyModel, optimizer: Any) -> Path:
    state = TrainerState(step=2, model="m", world_size=1, position=None, lora=LORA)
    return write_checkpoint(folder, state, state_tensors(policy.causal_lm, optimizer), keep=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_served_is_what_was_trained(name: str, single_rank: None, tmp_path: Path) -> None:
    """What a worker makes of what was published is the learner's own merge, to the bit, and says what the learner's
    forward pass says beside its adapters."""
    write_model(name, tmp_path)
    policy, _ = trained(tmp_path)
    assert policy.lora is not None
    learner = torch.tensor(score_probe(policy, TEXTS, max_tokens=64).logprobs)
    weights, causal_lm = served(policy, tmp_path), plain(tmp_path)

    before = logprobs(causal_lm)
    factors = {factor: whole(tensor) for factor, tensor in policy.lora.factors()}
    for weight, tensor in load_file(tmp_path / "model.safetensors").items():
        if f"{weight}.lora_A" in factors:
            tensor = merge(tensor, factors[f"{weight}.lora_A"], factors[f"{weight}.lora_B"], LORA.scale)
        assert torch.equal(weights.pop(weight), tensor), weight
        causal_lm.get_parameter(weight).data.copy_(tensor) if "experts" not in weight else None
    assert not weights
    assert (logprobs(causal_lm) - learner).abs().max() < 2e-4
    assert (before - learner).abs().max() > 0.05  # it has learnt something


def test_export_is_what_is_served_and_what_peft_merges(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    policy, optimizer = trained(tiny_model)
    learner = torch.tensor(score_probe(policy, TEXTS, max_tokens=64).logprobs)
    checkpoint = saved(tmp_path, policy, optimizer)
    for dtype in ("float32", "bfloat16"):
        export_checkpoint(checkpoint, tiny_model, tmp_path / dtype, dtype, merge=merge)
        exported, weights = load_file(tmp_path / dtype / "model.safetensors"), served(policy, tiny_model, dtype)
        assert exported.keys() == weights.keys()
        for name, tensor in exported.items():
            assert torch.equal(tensor, weights[name]), name
    by_peft: Any = PeftModel.from_pretrained(plain(tiny_model), tmp_path / "float32" / "adapter")
    assert (logprobs(plain(tmp_path / "float32")) - learner).abs().max() < 2e-4
    assert (logprobs(by_peft) - learner).abs().max() < 2e-4
    assert (logprobs(by_peft.merge_and_unload()) - learner).abs().max() < 2e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_alone_change_and_are_published(optimizer: Any, single_rank: None, tiny_model: Path) -> None:
    config = structs.replace(CONFIG, optimizer=optimizer, lr=1e-2)
    policy, train_step, _, _ = build(tiny_model, config)
    before = {name: whole(parameter).clone() for name, parameter in policy.causal_lm.named_parameters()}
    losses = [train_step(make_groups(0), 0)["loss/policy"] for _ in range(4)]
    assert losses[-1] < losses[0] - 1e-3
    for name, parameter in policy.causal_lm.named_parameters():
        assert torch.equal(whole(parameter), before[name]) == ("lora_" not in name), name
        assert parameter.requires_grad == ("lora_" in name)
    assert policy.lora is not None and len(policy.lora.layers) == 2 * 7
    snapshot = AdapterSnapshotter(policy.lora, rank=0).take(1)
    assert snapshot is not None
    assert snapshot.manifest.num_bytes == snapshot.data.nbytes == 4 * num_trainable(policy)
    assert num_trainable(policy) < sum(tensor.numel() for tensor in before.values()) / 4


def test_frozen_weights_have_the_compute_dtype_and_adapters_fp32(single_rank: None, tiny_model: Path) -> None:
    policy, optimizer = trained(tiny_model, dtype="bfloat16")
    for name, parameter in policy.causal_lm.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    tensors = state_tensors(policy.causal_lm, optimizer)
    assert all("lora_" in name for name in (*tensors["model"], *tensors["optimizer"]))
    assert {moment.dtype for moments in tensors["optimizer"].values() for moment in moments.values()} == {torch.float32}


def test_the_reference_is_the_policy_without_adapters(single_rank: None, tiny_model: Path) -> None:
    config = structs.replace(CONFIG, loss=LossConfig(kl_coef=0.1))
    policy, train_step, _, _ = build(tiny_model, config)
    for step in range(2):
        said = train_step(make_groups(step), step)["loss/reference_kl"]
        assert (said > 1e-4) == (step > 0)
    with adapters_off(policy.lora):
        without = score_probe(policy, TEXTS, max_tokens=64)
    assert without == score_probe(build_reference(str(tiny_model), ModelOptions()), TEXTS, max_tokens=64)
    assert without != score_probe(policy, TEXTS, max_tokens=64)


def test_gradient_checkpointing_changes_nothing(single_rank: None, tiny_model: Path) -> None:
    config = structs.replace(CONFIG, lr=1e-3)
    (ours, _), (theirs, _) = trained(tiny_model, config, gradient_checkpointing=True), trained(tiny_model, config)
    assert ours.lora is not None and theirs.lora is not None
    for (name, own), (_, other) in zip(ours.lora.factors(), theirs.lora.factors(), strict=True):
        assert torch.allclose(whole(own), whole(other), atol=1e-5), name


def test_compiled_layers_know_when_adapters_are_off(
    single_rank: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph holds the scale as a constant. The graph is run as it was captured: to make C++ of it takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager, _ = trained(tiny_model)
    compiled, *_ = build(tiny_model, compile=True)
    compiled.causal_lm.load_state_dict(eager.causal_lm.state_dict())
    for lora in (None, compiled.lora, None):
        with adapters_off(lora):
            ours = score_probe(compiled, TEXTS, max_tokens=128)
        with adapters_off(None if lora is None else eager.lora):
            theirs = score_probe(eager, TEXTS, max_tokens=128)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_resumed_run_goes_on_to_the_last_bit(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    policy, train_step, optimizer, _ = build(tiny_model)
    for step in range(2):
        train_step(make_groups(step), step)
    path = saved(tmp_path, policy, optimizer)
    torch.manual_seed(1)  # other adapters at first
    other = build_model(tiny_model, ModelOptions(lora=LORA))
    other_optimizer, scheduler = build_optimizer(other.parameters(), CONFIG)
    load_checkpoint(path, other.causal_lm, other_optimizer)
    resume_schedule(scheduler, 2)
    for taken in (train_step, TrainStep(other, other_optimizer, scheduler, CONFIG)):
        taken(make_groups(2), 2)
    for own, other_own in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(own), whole(other_own))


# ---------------------------------------------------------------- refused


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    bus = train(tiny_model, folder, structs.replace(CONFIG, steps=1))
    (row,) = bus.metrics()
    matrices = [weight.shape for name, weight in load_file(tiny_model / "model.safetensors").items() if "proj" in name]
    num_trainable = sum(LORA.rank * (into + out) for out, into in matrices)
    assert row["learner/num_trainable"] == num_trainable
    published = [message.num_bytes for message in bus.sent if isinstance(message, VersionPublished)]
    assert published == [4 * num_trainable] * 2
    return folder / "step-000001"


OTHER_SETTINGS = {
    "rank": LoraConfig(rank=8, alpha=8.0),
    "alpha": LoraConfig(rank=4, alpha=16.0),
    "targets": LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj",)),
    "none": LoraConfig(),
}


@pytest.mark.parametrize("changed", OTHER_SETTINGS)
def test_a_checkpoint_of_other_adapters_is_refused(
    changed: str, checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert read_trainer_state(checkpoint).lora == LORA
    config = LearnerConfig(steps=2, lora=OTHER_SETTINGS[changed])
    with pytest.raises(ValueError) as raised:
        train(tiny_model, tmp_path, config, resume_from=checkpoint)
    here = str(config.lora)
    there = "learner.lora.rank=4 alpha=8 target_modules=all-linear"
    assert str(raised.value) == (
        f"checkpoint {checkpoint} has {there}, this run {here}: go on with the settings of the checkpoint"
    )


@pytest.mark.parametrize(
    ("name", "target", "says"),
    [
        ("llama", "w_proj", "'w_proj', which is of no layer's name in this model: allowed are all-linear, q_proj, k_"),
        ("llama", "lm_head", "'lm_head', which is not a plain linear layer of the decoder"),
        ("llama", "embed_tokens", "not a plain linear layer"),
        ("qwen3-moe", "experts", "'experts', which is not a plain linear layer of the decoder in this model: allowed"),
        ("qwen3-moe", "gate", "not a plain linear layer"),
    ],
)
def test_what_cannot_be_adapted_is_refused(name: str, target: str, says: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with pytest.raises(ValueError, match=r"^learner\.lora\.target_modules has ") as raised:
        target_names(model, decoder_layers(model), ("q_proj", target))
    assert says in str(raised.value) and "\n" not in str(raised.value)
    names = target_names(model, decoder_layers(model), ("o_proj", "q_proj"))
    assert {each.rpartition(".")[2] for each in names} == {"q_proj", "o_proj"} and len(names) == 4
