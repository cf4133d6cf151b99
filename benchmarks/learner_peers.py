"""Peers of the learner's benchmark: TRL's GRPOTrainer, and a plain loop over padded batches with full logits."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, TrainerCallback

from databus.groups import Group
from learner.advantages import estimate_advantages
from learner.config import LearnerConfig
from learner.losses import LossTokens, policy_loss
from learner.model import load_causal_lm
from learner.sequences import Sequence, sequences_of, weighted, with_advantages

TRL_BATCH, PADDED_BATCH = 4, 4
"""Completions of one forward pass: with those of the longest, about as many positions as one of ours has."""


class PaddedLoop:
    """Our loss and optimizer; completions in the order they come, padded to the longest of a pass; logits of all."""

    def __init__(self, model: Path, config: LearnerConfig) -> None:
        self._model = load_causal_lm(model)
        self._config = config
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )

    def step(self, groups: list[Group]) -> None:
        sequences = with_advantages(sequences_of(groups, 0), groups, estimate_advantages(groups, "grpo"))
        sequences = weighted(sequences, self._config.loss)
        for start in range(0, len(sequences), PADDED_BATCH):
            part = sequences[start : start + PADDED_BATCH]
            logprobs, entropy = self._logprobs(part)
            loss, _ = policy_loss(logprobs, entropy, _loss_tokens(part), self._config.loss)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _logprobs(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Of the loss-bearing tokens of all sequences, end to end."""
        ids = [torch.from_numpy(sequence.token_ids) for sequence in sequences]
        input_ids = pad_sequence([row[:-1] for row in ids], batch_first=True)
        mask = pad_sequence([torch.ones_like(row[:-1]) for row in ids], batch_first=True)
        log_softmax = self._model(input_ids=input_ids, attention_mask=mask).logits.log_softmax(-1)
        targets = pad_sequence([row[1:] for row in ids], batch_first=True)
        logprobs = log_softmax.gather(-1, targets[..., None])[..., 0]
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        kept = [(row, torch.from_numpy(sequence.targets - 1)) for row, sequence in enumerate(sequences)]
        return (torch.cat([of[row, places] for row, places in kept]) for of in (logprobs, entropy))  # type: ignore


def _loss_tokens(sequences: list[Sequence]) -> LossTokens:
    counts = [len(sequence.targets) for sequence in sequences]
    return LossTokens(
        sampled=torch.from_numpy(np.concatenate([sequence.logprobs for sequence in sequences])),
        advantages=torch.from_numpy(np.concatenate([sequence.advantages for sequence in sequences])),
        weights=torch.from_numpy(np.repeat([sequence.weight for sequence in sequences], counts)).float(),
        owners=torch.from_numpy(np.repeat(np.arange(len(sequences)), counts)),
        lags=torch.zeros(sum(counts), dtype=torch.int64),
        num_sequences=len(sequences),
    )


class Clock(TrainerCallback):
    """Seconds of TRL's steps without generation and scoring; calls `between` before each step."""

    def __init__(self, between: Callable[[], object]) -> None:
        self.seconds: list[float] = []
        self.generating_s = 0.0
        self._between = between
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._between()
        self.generating_s = 0.0
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start - self.generating_s)


@contextmanager
def _generation_off(clock: Clock) -> Iterator[None]:
    start = time.perf_counter()
    yield
    clock.generating_s += time.perf_counter() - start


def train_with_trl(
    model: Path, folder: Path, groups: list[Group], config: LearnerConfig, steps: int, between: Callable[[], object]
) -> list[float]:
    """Seconds of each of TRL's steps on the groups: forward and backward passes, clipping, optimizer.

    Its whole training loop runs, with a generation that gives the groups; the time of that and of all that TRL does
    with completions before it trains (scoring, padding, advantages) is left out.
    Args: between: called before each step, outside its time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    clock = Clock(between)

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with _generation_off(clock):
                return super()._generate_and_score_completions(inputs)

    num_completions = sum(group.size for group in groups)
    settings = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=num_completions // TRL_BATCH,
        num_generations=groups[0].size,
        max_completion_length=int(max(group.lengths.max() for group in groups)),
        learning_rate=config.lr,
        adam_beta2=config.betas[1],
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm,
        loss_type="dapo",
        gradient_checkpointing=False,  # costs time, and memory is no constraint here
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    rewards = np.concatenate([group.rewards for group in groups]).tolist()
    trainer = Trainer(
        model=load_causal_lm(model),
        reward_funcs=lambda completions, **_: rewards,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [f"w{index}" for index in range(len(groups))]}),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
        rollout_func=lambda prompts, trainer: _rollouts(groups),
    )
    trainer.train()
    return clock.seconds


def _rollouts(groups: list[Group]) -> dict[str, list[list[Any]]]:
    columns: dict[str, list[list[Any]]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for group in groups:
        ends = np.cumsum(group.lengths)[:-1]
        columns["prompt_ids"] += [group.prompt_ids.tolist()] * group.size
        columns["completion_ids"] += [part.tolist() for part in np.split(group.token_ids, ends)]
        columns["logprobs"] += [part.tolist() for part in np.split(group.logprobs, ends)]
    return columns
