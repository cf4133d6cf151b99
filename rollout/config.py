"""Settings of rollout workers."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]


class ReasoningConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Separate budgets for thinking and for the solution (Elastic Reasoning, arXiv:2505.05315).

    thinking_tokens: where thinking has not ended by then, `end` is forced; 0: no budgets, only `max_tokens`.
    solution_tokens: what the solution may take after `end`, however long the thinking was.
    end: text that ends the thinking.
    """

    thinking_tokens: Annotated[int, Meta(ge=0)] = 0
    solution_tokens: PositiveInt = 512
    end: Annotated[str, Meta(min_length=1)] = "</think>"


class RolloutConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rollout workers and their engines.

    workers: how many the supervisor starts; more may join later (`echelon worker --join`).
    engine: `vllm`, or `small`, a slow deterministic engine on a transformers model for tests.
    device, dtype: where the engine runs and its serving dtype, the one that weights are published in.
    max_sequences: sequences that one engine runs at once; with `group_size` it gives the worker's credit.
    context_tokens: prompt and completion together; a longer prompt is refused before the run starts.
    max_tokens, temperature: sampling of training completions. There is no top-p or top-k: they would bias
        the importance ratio between the sampled and the trained distribution.
    gpu_memory_fraction: share of a GPU that vLLM may take. kv_cache_gib: KV cache of a CPU engine.
    enforce_eager: skip vLLM's graph capture and compilation (faster start, slower steps).
    reasoning: budgets within `max_tokens`, which must have room for thinking, its end and the solution.
    """

    workers: PositiveInt = 1
    engine: Literal["vllm", "small"] = "vllm"
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_sequences: PositiveInt = 256
    context_tokens: PositiveInt = 2048
    max_tokens: PositiveInt = 1024
    temperature: PositiveFloat = 1.0
    gpu_memory_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.5
    kv_cache_gib: PositiveInt = 1
    enforce_eager: bool = True
    start_timeout_s: PositiveFloat = 600.0
    reasoning: ReasoningConfig = ReasoningConfig()


class DraftConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speculative drafting from suffix trees of earlier completions; see `rollout.drafting`.

    policy: how many tokens are drafted for whom. `marginal`: where the expected gain in tokens a second is
        largest, by a latency model fitted online; `logarithmic`: by the logarithm of a request's predicted length
        (arXiv 2511.13841); `off`: no drafting.
    max_tokens: most tokens drafted for one request at a time.
    window_versions: completions sampled more than so many policy versions ago are forgotten.
    history_tokens: newest completions of a problem that travel with its lease, at most so many tokens.
    index_tokens: tokens that an engine's trees hold, all problems together; beyond, the least recently used go.
    record: keep every completed group in RUN_DIR/rollouts.bin, for `echelon bench-draft`; whatever the policy is.
    """

    policy: Literal["off", "marginal", "logarithmic"] = "off"
    max_tokens: Annotated[int, Meta(ge=1, le=64)] = 16
    window_versions: PositiveInt = 16
    history_tokens: Annotated[int, Meta(ge=0)] = 8192
    index_tokens: Annotated[int, Meta(ge=1024)] = 4_000_000
    record: bool = False
