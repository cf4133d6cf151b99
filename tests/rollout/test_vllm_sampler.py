"""The sampler's mend against vLLM's own kernels; what it is for is proved in drafting/test_lossless.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.engine.vllm_sampler import expand, mend_sampler, sample_plainly_without_drafts

CUMULATIVE = torch.tensor([2, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_draft_token_gets_its_requests_value(dtype: torch.dtype) -> None:
    output = torch.full((3,), 77, dtype=dtype)
    expand(output, torch.tensor([4, 5, 0], dtype=dtype), CUMULATIVE, 0, 1, 128)
    assert output.tolist() == [4, 4, 1]


def test_without_drafts_nothing_is_written() -> None:
    expand(torch.empty(0), torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), 0, 1)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_vllms_kernel_is_defective_until_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    if current_platform.device_type != "cpu":
        pytest.skip("CUDA has the kernel itself")

    def temperatures() -> list[float]:
        given = torch.tensor([0.25, 3.0, 0.0])
        monkeypatch.setattr(given.__class__, "new_empty", lambda self, size: self.new_full((size,), -1.0))
        return expand_batch_to_tokens(given, CUMULATIVE, 3, replace_from=0, replace_to=1).tolist()

    current_platform.register_triton_kernel_overrides()
    assert temperatures() == [-1.0] * 3
    assert mend_sampler()
    assert temperatures() == [0.25, 0.25, 1.0]
    assert not mend_sampler()


def test_steps_without_drafts_are_sampled_plainly() -> None:
    sampler: Any = SimpleNamespace(
        sampler=lambda logits, sampling_metadata: ("plain", logits), forward=lambda *given: ("rejection", *given)
    )
    for _ in range(2):
        sample_plainly_without_drafts(sampler)
    logits = torch.zeros(2, 3)
    none, one = (SimpleNamespace(draft_token_ids=torch.zeros(count)) for count in (0, 1))
    assert sampler.forward(none, None, logits, "m") == ("plain", logits)
    assert sampler.forward(one, None, logits, "m") == ("rejection", one, None, logits, "m")
