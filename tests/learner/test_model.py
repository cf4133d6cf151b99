from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoint import whole
from torch import Tensor, nn

from learner.model import ModelOptions, PolicyModel, build_model, decoder_layers, load_causal_lm
from learner.packing import MicroBatch, plan_microbatches
from learner.sequences import Sequence

LENGTHS = (13, 2, 9, 30, 5, 17)
TEMPERATURE = 0.7


def make_sequences() -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(
            token_ids=rng.integers(0, 17, length),
            targets=np.arange(1, length),
            logprobs=np.full(length - 1, index, np.float32),  # marks the sequence
            lag=0,
            start=0,
            advantages=np.ones(length - 1, np.float32),
        )
        for index, length in enumerate(LENGTHS)
    ]


def forward(policy: PolicyModel, microbatch: MicroBatch) -> tuple[Tensor, Tensor]:
    return policy(microbatch.input_ids, microbatch.position_ids, microbatch.loss_positions, microbatch.targets)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_equals_unpacked_transformers(gradient_checkpointing: bool, single_rank: None, tiny_model: Path) -> None:
    assert_packed_equals_unpacked(tiny_model, gradient_checkpointing)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own, looking at hidden states
def test_compiled_equals_eager(single_rank: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is run as it was captured: to make C++ of it takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (microbatch,) = plan_microbatches(make_sequences(), 0, 1, 90)
    compiled, eager = (build_model(tiny_model, ModelOptions(compile=compile)) for compile in (True, False))
    ours, theirs = (forward(policy, microbatch)[0] for policy in (compiled, eager))
    assert torch.allclose(ours, theirs, atol=1e-5)
    (ours.sum() + theirs.sum()).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for own, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(whole(own.grad), whole(other.grad), rtol=1e-3, atol=1e-4)


def assert_packed_equals_unpacked(model: Path, gradient_checkpointing: bool = False) -> None:
    """Values and gradients, against one plain forward pass of transformers a sequence."""
    sequences = make_sequences()
    options = ModelOptions(
        temperature=TEMPERATURE, logprob_chunk_tokens=16, gradient_checkpointing=gradient_checkpointing
    )
    policy = build_model(model, options)
    (microbatch,) = plan_microbatches(sequences, 0, 1, 90)
    assert (microbatch.position_ids == 0).sum() == len(LENGTHS)  # several sequences a row
    logprobs, entropy = forward(policy, microbatch)
    logprobs.sum().backward()

    plain = load_causal_lm(model)
    expected = [plain_logprobs(plain, sequence) for sequence in sequences]
    torch.cat([values for values, _ in expected]).sum().backward()
    for index, (values, entropies) in enumerate(expected):
        own = microbatch.tokens.sampled == index
        assert torch.allclose(logprobs[own], values, atol=1e-5)
        assert torch.allclose(entropy[own], entropies, atol=1e-5)
    assert_same_gradients(policy, plain)


def plain_logprobs(model: Any, sequence: Sequence) -> tuple[Tensor, Tensor]:
    logits = model(torch.from_numpy(sequence.token_ids[None, :-1])).logits[0] / TEMPERATURE
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(torch.from_numpy(sequence.token_ids[1:])), distribution.entropy()


def assert_same_gradients(policy: PolicyModel, plain: nn.Module) -> None:
    expected = dict(plain.named_parameters())
    ours = dict(policy.causal_lm.named_parameters())
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        grad: Any = parameter.grad
        plain_grad: Any = expected[name].grad
        assert torch.allclose(grad.full_tensor(), plain_grad, rtol=1e-3, atol=1e-4), name


def test_bfloat16_computes_low_and_keeps_masters(single_rank: None, tiny_model: Path) -> None:
    (microbatch,) = plan_microbatches(make_sequences(), 0, 1, 4096)
    policy = build_model(tiny_model, ModelOptions(dtype="bfloat16"))
    full, _ = forward(build_model(tiny_model, ModelOptions()), microbatch)
    low, _ = forward(policy, microbatch)
    low.sum().backward()
    assert low.dtype == torch.float32
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in policy.parameters() if parameter.grad is not None} == {torch.float32}
    assert not torch.equal(low, full)
    assert torch.allclose(low, full, atol=0.3)


def test_every_decoder_layer_is_sharded(tiny_model: Path) -> None:
    assert len(decoder_layers(load_causal_lm(tiny_model))) == 2


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model") as raised:
        load_causal_lm(tmp_path / "nowhere")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "bias", "reason"),
    [({"logit_scale": 0.5}, False, "its config sets logit_scale"), ({}, True, "not a plain matrix")],
)
def test_unsupported_heads_are_refused(config: dict[str, float], bias: bool, reason: str) -> None:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(**config)
            self.head = nn.Linear(2, 3, bias=bias)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    fake: Any = Fake()
    with pytest.raises(ValueError, match=f"Fake cannot be trained: .*{reason}"):
        PolicyModel(fake, 1.0, 16)
