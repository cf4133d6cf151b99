"""One group in the small engine: its KV cache, its tokens so far, its noise."""

from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rollout.engine.base import Completion, GenerateRequest


class RunningGroup:
    """G completions of one prompt, decoded as one batch of constant size.

    Rows that have ended are decoded on and ignored: with a smaller batch the same row could round differently.
    """

    def __init__(
        self, request: GenerateRequest, model: Any, end_ids: list[int], seed: int, context_tokens: int
    ) -> None:
        self.request = request
        self._model = model
        given = [*request.prompt_ids, *request.prefix]
        self._limit = min(request.sampling.max_tokens, context_tokens - len(given))
        self._end_ids = end_ids
        self._noise_key = xxhash.xxh3_128_intdigest(f"{seed}/{request.cursor}".encode())
        self._cache: Any = None
        self._given = torch.tensor([given] * request.group_size, device=model.device)
        self._input = self._given
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._versions: list[int] = []
        self._lengths = np.zeros(request.group_size, np.int64)
        self._ended = np.zeros(request.group_size, bool)

    @property
    def finished(self) -> bool:
        return bool(self._ended.all()) or len(self._tokens) >= self._limit

    @torch.inference_mode()
    def step(self, version: int) -> int:
        """Sample one token a row with the weights of `version`; returns how many rows were still running."""
        output = self._model(input_ids=self._input, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        temperature = self.request.sampling.temperature
        logits = output.logits[:, -1].float().cpu() / (temperature or 1.0)
        choice = (logits + self._noise(logits.shape[-1]) if temperature else logits).argmax(-1)
        logprobs = torch.log_softmax(logits, -1).gather(-1, choice[:, None])[:, 0]
        self._input = choice[:, None].to(self._model.device)
        return self._keep(choice, logprobs, version)

    def forget_cache(self) -> None:
        """The next step computes the whole context again, with the weights that there are then."""
        self._cache = None
        self._input = torch.cat([self._given, *(tokens[:, None].to(self._given.device) for tokens in self._tokens)], 1)

    def completions(self) -> list[Completion]:
        tokens = torch.stack(self._tokens, 1).numpy().astype(np.int32)
        logprobs = torch.stack(self._logprobs, 1).numpy().astype(np.float32)
        versions = np.array(self._versions, np.int32)
        return [
            Completion(
                token_ids=tokens[row, :length],
                logprobs=logprobs[row, :length],
                versions=versions[:length],
                truncated=not self._ended[row],
            )
            for row, length in enumerate(self._lengths)
        ]

    def _keep(self, choice: Tensor, logprobs: Tensor, version: int) -> int:
        running = ~self._ended
        self._tokens.append(choice)
        self._logprobs.append(logprobs)
        self._versions.append(version)
        self._lengths += running
        self._ended |= np.isin(choice.numpy(), self._end_ids)
        return int(running.sum())

    def _noise(self, vocabulary: int) -> Tensor:
        """Gumbel noise [G, V]: the largest of logits + noise is a sample of the softmax."""
        position = len(self.request.prefix) + len(self._tokens)
        first = self.request.first_sample
        rows = []
        for sample in range(first, first + self.request.group_size):
            bits = np.random.Philox(key=self._noise_key, counter=[0, position, sample, 0])
            uniform = np.random.Generator(bits).random(vocabulary)
            rows.append(-np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny))))
        return torch.from_numpy(np.stack(rows))
