"""Mends vLLM 0.32.0's rejection sampler on the CPU. Without it, drafting at a temperature changes what is sampled.

There is no Triton on a CPU, so vLLM's kernels are replaced by C++ ones behind adapters, which convert tensors to
the int64 that the C++ expects. `vllm.utils.cpu_triton_utils._expand_kernel_impl` converts its *output* too, lets the
C++ fill the copy, and drops it. So the temperature, top-k and top-p of every drafted position are whatever the
memory held before. `tests/rollout/drafting/test_lossless.py` shows whether a later vLLM still needs this.
"""

from typing import Any

import torch

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def mend_sampler() -> bool:
    """Replace the defective kernel in this process, the one that samples; needs to come after vLLM chose its kernels.

    Returns: whether there was something to mend: False with CUDA or Triton, in a mended vLLM, or when called again.
    Raises: RuntimeError where the sampler is wrong in a way that this does not mend.
    """
    from vllm.triton_utils import dispatcher

    replaced = dispatcher._registry.get(KERNEL)
    if replaced is None or _fills(replaced[1]):
        return False
    del dispatcher._registry[KERNEL]  # or registering it again would be warned of
    dispatcher.register_kernels({KERNEL: expand})
    _check()
    return True


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
