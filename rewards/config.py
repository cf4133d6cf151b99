"""Settings of scoring."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

NonNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]


class SandboxConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where generated code runs; see docs/guide/sandbox.md.

    kind: `auto` takes bubblewrap where it is installed, else namespaces, else rlimits with a warning.
    memory_bytes: address space of each process. processes: at once, threads among them.
    files_bytes: of all files that it writes together. output_bytes: of each file, stdout and stderr among them.
    """

    kind: Literal["auto", "bubblewrap", "namespaces", "rlimits"] = "auto"
    memory_bytes: Annotated[int, Meta(ge=64 << 20)] = 512 << 20
    processes: PositiveInt = 8
    files_bytes: Annotated[int, Meta(ge=1 << 16)] = 16 << 20
    output_bytes: Annotated[int, Meta(ge=1 << 12)] = 1 << 20


class CodeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `code` reward: tests of a program.

    partial: the share of tests passed; else 1 where all pass. test_s: time for one run of the program. total_s: for all
    tests of a completion, which fail from then on; below `reward.timeout_s`, beyond which the group fails.
    """

    partial: bool = False
    test_s: Positive = 4.0
    total_s: Positive = 8.0


class FormatConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `format` reward: 1 where the whole completion matches the regular expression; `.` matches newlines too."""

    pattern: str = r"\s*<think>.*</think>\s*\S.*"


class LengthConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `length` reward: 1 from `min_tokens` to `max_tokens`, falling to 0 over `slack_tokens` on either side.

    What ends for want of room is shaped by the learner: `learner.advantage.overlong_tokens`.
    """

    min_tokens: NonNegativeInt = 0
    max_tokens: PositiveInt = 1024
    slack_tokens: PositiveInt = 256


class JudgeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `judge` reward: a model behind an OpenAI-compatible endpoint marks the completion.

    url: up to and with `/v1`. api_key_env: the environment variable that has the key; "": none is sent.
    rubric: the user's message; {prompt}, {completion} and the fields of the row are filled in. system: goes before it.
    max_mark: marks go from 0 to it; the reward is the mark's share of it.
    retries: after 429, a 5xx, a lost connection, a time-out, or an answer without a mark; with growing pauses.
    request_s: for one request. requests_per_s: of a worker, all its processes together; 0: no limit.
    concurrent: requests at once, of each process. cache: a file that keeps marks; "": in memory only.
    """

    url: str = ""
    model: str = ""
    api_key_env: str = ""
    system: str = "You mark answers. End with a line `Mark: N`, N a number."
    rubric: str = (
        "Question:\n{prompt}\n\nAnswer:\n{completion}\n\nIs the answer right and complete? "
        "Mark it from 0 (wrong) to 10 (right and complete)."
    )
    max_mark: Positive = 10.0
    max_tokens: PositiveInt = 512
    temperature: NonNegative = 0.0
    retries: NonNegativeInt = 3
    request_s: Positive = 20.0
    requests_per_s: NonNegative = 0.0
    concurrent: PositiveInt = 16
    cache: str = ""


class RewardPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reward of several. function: as `RewardConfig.function`. weight: its values are multiplied by it.

    name: what metrics call it; "": the built-in's or the function's own name.
    """

    function: str
    weight: float = 1.0
    name: str = ""


class RewardConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How completions are scored.

    function: `math`, `code`, `reasoning_gym`, `format`, `length`, `judge`, or `PATH.py:FUNCTION`: a function of one
        `rewards.Sample` that returns a number, or a dict of parts whose sum is the reward.
    parts: several of them, instead of `function`; the reward is the sum of the weighted values.
    processes: size of a worker's scoring pool.
    timeout_s: time for one completion; a function that takes longer is killed and its group fails.
    max_failures: failed groups in a row, because of the reward, that stop the run.
    """

    function: str = "math"
    parts: tuple[RewardPart, ...] = ()
    processes: PositiveInt = 1
    timeout_s: Positive = 10.0
    max_failures: PositiveInt = 5
    code: CodeConfig = CodeConfig()
    sandbox: SandboxConfig = SandboxConfig()
    format: FormatConfig = FormatConfig()
    length: LengthConfig = LengthConfig()
    judge: JudgeConfig = JudgeConfig()
