"""The sampler's mend against vLLM's own kernels; what it is for is proved in drafting/test_lossless.py."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.engine.vllm_sampler import expand, sample_plainly_without_drafts

CUMULATIVE = torch.tensor([2, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_draft_token_gets_its_requests_value(dtype: torch.dtype) -> None:
    output = torch.full((3,), 77, dtype=dtype)
    expand(output, torch.tensor([4, 5, 0], dtype=dtype), CUMULATIVE, 0, 1, 128)
    assert output.tolist() == [4, 4, 1]


def test_without_drafts_nothing_is_written() -> None:
    whole = torch.full((3,), 77.0)
    expand(whole[:0], torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), 0, 1)
    assert whole.tolist() == [77.0] * 3


MENDING = """
import torch
from vllm.platforms import current_platform
assert current_platform.device_type == "cpu"
current_platform.register_triton_kernel_overrides()
import numba  # with it loaded, vLLM could not look for its kernels again
from rollout.engine.vllm_sampler import mend_sampler
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

def temperatures():
    given, counts = torch.tensor([0.25, 3.0, 0.0]), torch.tensor([2, 2, 3], dtype=torch.int32)
    return expand_batch_to_tokens(given, counts, 3, replace_from=0, replace_to=1).tolist()

torch.Tensor.new_empty = lambda self, size: self.new_full((size,), -1.0)
assert temperatures() == [-1.0] * 3, temperatures()
assert mend_sampler()
assert temperatures() == [0.25, 0.25, 1.0], temperatures()
assert not mend_sampler()
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_vllms_kernel_is_defective_until_it_is_mended() -> None:
    """In a process of its own: vLLM's kernels are chosen once for all."""
    command = [sys.executable, "-c", MENDING]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


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
