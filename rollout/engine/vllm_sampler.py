"""Mends vLLM 0.32.0's rejection sampler. Without it, drafting at a temperature changes what is sampled.

On the CPU alone: there is no Triton, so vLLM's kernels are replaced by C++ ones behind adapters, which convert
tensors to the int64 that the C++ expects. `vllm.utils.cpu_triton_utils._expand_kernel_impl` converts its *output* too,
lets the C++ fill the copy, and drops it. So the temperature, top-k and top-p of every drafted position are whatever
the memory held before. `tests/rollout/drafting/test_lossless.py` shows whether a later vLLM still needs this.

On any device: once there is a proposer, every step goes through the rejection sampler, even one without a draft. That
costs more than plain sampling, and with top-k alone it ends the engine (a maximum over no elements).
"""

from typing import Any

import torch


def mend_sampler() -> bool:
    """Replace the defective kernel in this process, the one that samples, once vLLM has chosen its kernels.

    What is replaced lies inside of vLLM's stand-in for the kernel, to which all its users refer. Registering another
    kernel would have vLLM look for those again, and fail at what some modules hold, numba's among them.

    Returns: whether there was something to mend: False with CUDA or Triton, in a mended vLLM, or when called again.
    Raises: RuntimeError where the sampler is wrong in a way that this does not mend.
    """
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.sample.rejection_sampler import expand_kernel

    if not isinstance(expand_kernel, KernelOverride) or _fills(expand_kernel._impl):
        return False
    expand_kernel._impl = expand
    _check()
    return True


def sample_plainly_without_drafts(sampler: Any) -> None:
    """A rejection sampler leaves steps in which nothing was drafted to its plain sampler.

    Args: sampler: vLLM's `RejectionSampler`, changed in place.
    """
    if isinstance(sampler.forward, _Forward):
        return
    sampler.forward = _Forward(sampler.sampler, sampler.forward)


class _Forward:
    """In place of a rejection sampler's `forward`."""

    def __init__(self, plain: Any, with_drafts: Any) -> None:
        self._plain = plain
        self._with_drafts = with_drafts

    def __call__(self, metadata: Any, draft_probs: Any, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        """Without a draft, `logits` has one row a request, in order, just what the plain sampler takes."""
        if len(metadata.draft_token_ids):
            return self._with_drafts(metadata, draft_probs, logits, sampling_metadata)
        return self._plain(logits=logits, sampling_metadata=sampling_metadata)


def expand(
    output: torch.Tensor,
    input_val: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Give every draft token its request's value.

    Args: output: [T], written. input_val: [R]. cu_num_tokens: [R], draft tokens of requests 0..r together.
        replace_from, replace_to: a value to write instead of another. MAX_NUM_TOKENS: a size of Triton's, unused.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(input_val == replace_from, replace_to, input_val).to(output.dtype)
    output.copy_(torch.repeat_interleave(values, counts, output_size=len(output)))


def _fills(kernel: Any) -> bool:
    """Does it write its output at all?"""
    output = torch.full((3,), -1.0)
    kernel(output, torch.tensor([0.5, 0.0]), torch.tensor([1, 3], dtype=torch.int32), 0, 1, 128)
    return output.tolist() == [0.5, 1.0, 1.0]


def _check() -> None:
    """Through the function that the sampler itself calls."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    counts = torch.tensor([2, 2, 3], dtype=torch.int32)
    temperatures = expand_batch_to_tokens(torch.tensor([0.25, 3.0, 0.0]), counts, 3, replace_from=0, replace_to=1)
    if temperatures.tolist() != [0.25, 0.25, 1.0]:
        raise RuntimeError("vLLM's rejection sampler takes wrong temperatures for drafts: set draft.policy=off")
