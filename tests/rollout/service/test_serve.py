"""A real `echelon serve`, with drafting, asked by curl, by OpenAI's client and by ours."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from rollout.engine.base import Completion
from rollout.service.client import RequestFailed, ServiceClient, ServiceUnreachable
from rollout.service.protocol import FailedGroup, Prompt, ScoredCompletion, ScoredGroup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[3]
API_KEY, ADMIN_KEY, NAME = "the-key-of-all-users", "the-key-of-operators", "tiny"
PROMPT, PROMPT_IDS = "3+5=", [6, 13, 8, 14]
DEADLINE_S = 120.0
RUN_S = 400.0
"""For a whole small run beside the service, on a machine that others use."""
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def asked(service: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=API_KEY, max_retries=0, timeout=DEADLINE_S) as client:
        yield client


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[ServiceClient]:
    with service.client() as made:
        yield made


@pytest.fixture(scope="module")
def operator(service: Any) -> Iterator[ServiceClient]:
    with service.client(ADMIN_KEY) as made:
        yield made


@pytest.fixture(scope="module")
def folders(tiny_model: Path, other_model: Path) -> list[Path]:
    """Models, as `echelon export` leaves them; the service starts with the first."""
    return [tiny_model, other_model]


def curl(service: Any, path: str, *words: str, key: str = API_KEY) -> tuple[int, str]:
    """(status, body)"""
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}"]
    done = subprocess.run(
        [*command, *words, service.url + path], capture_output=True, text=True, timeout=90, check=True
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


# ---------------------------------------------------------------- vLLM's routes


def test_models(asked: openai.OpenAI) -> None:
    assert [model.id for model in asked.models.list()] == [NAME]


def test_completion_and_its_stream_are_the_same(asked: openai.OpenAI) -> None:
    how: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logprobs": 1}
    whole = asked.completions.create(**how).choices[0]
    parts = [part.choices[0] for part in asked.completions.create(**how, stream=True) if part.choices]
    assert "".join(part.text for part in parts) == whole.text != ""
    assert parts[-1].finish_reason == whole.finish_reason
    assert whole.logprobs is not None and whole.logprobs.token_logprobs is not None
    streamed = [each for part in parts if part.logprobs for each in part.logprobs.token_logprobs or ()]
    np.testing.assert_allclose(streamed, whole.logprobs.token_logprobs, atol=TOLERANCE)


def test_several_samples(asked: openai.OpenAI) -> None:
    several = asked.completions.create(model=NAME, prompt=[PROMPT, "1+1="], max_tokens=30, n=5)
    assert len({choice.text for choice in several.choices}) > 3
    assert sorted(choice.index for choice in several.choices) == list(range(10))


def test_tokens_there_and_back(service: Any) -> None:
    how = ("-H", "content-type: application/json", "-d")
    status, body = curl(service, "/tokenize", *how, json.dumps({"model": NAME, "prompt": PROMPT}))
    assert (status, json.loads(body)["tokens"]) == (200, PROMPT_IDS)
    status, body = curl(service, "/detokenize", *how, json.dumps({"model": NAME, "tokens": PROMPT_IDS}))
    assert (status, json.loads(body)["prompt"]) == (200, PROMPT)


def test_no_chat_without_a_template(asked: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template"):
        asked.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "1"}])


WRONG_COMPLETIONS: list[tuple[Any, int, str]] = [
    (b"{", 400, "JSON"),
    (b"[]", 400, "dict"),
    ({"model": "other"}, 404, "does not exist"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": [6] * 400}, 400, "max_tokens"),  # no room is left for a token
    ({"temprature": 0.5}, 400, "unknown field 'temprature'"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"seed": 1}, 400, "seed is not supported"),
    ({"vllm_xargs": {"echelon_probe": 1}}, 400, "not for requests"),
]


@pytest.mark.parametrize(("fields", "status", "reason"), WRONG_COMPLETIONS)
def test_vllms_routes_say_what_is_wrong(service: Any, fields: Any, status: int, reason: str) -> None:
    answer = post(service, "/v1/completions", fields, {"model": NAME, "prompt": PROMPT, "max_tokens": 4})
    message = answer.json()["error"]["message"]
    assert (answer.status_code, reason in message) == (status, True), message
    assert "Traceback" not in message


def test_fields_without_effect_are_taken(service: Any) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 4, "user": "somebody", "metadata": {"a": "b"}}
    assert post(service, "/v1/completions", {}, body).status_code == 200


def test_what_is_wrong_is_counted_and_disturbs_nobody(service: Any, asked: openai.OpenAI) -> None:
    """All of it, while somebody else listens to a stream."""
    how: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 380, "temperature": 0, "logprobs": 1}
    how["extra_body"] = {"ignore_eos": True}
    alone = asked.completions.create(**how).choices[0].text
    before = metric(service, "echelon_requests_refused_total")
    stream = iter(asked.completions.create(**how, stream=True))
    said = [next(stream).choices[0].text]
    completions = [
        post(service, "/v1/completions", each[0], {"model": NAME, "prompt": PROMPT}) for each in WRONG_COMPLETIONS
    ]
    rollouts = [post(service, "/v1/rollouts", each[0], GOOD_ROLLOUT) for each in BAD]
    assert not [answer for answer in completions + rollouts if answer.is_success]
    said += [part.choices[0].text for part in stream if part.choices]
    assert "".join(said) == alone
    assert metric(service, "echelon_requests_refused_total") == before + len(completions) + len(rollouts)


# ---------------------------------------------------------------- rollouts


def test_groups_are_scored(client: ServiceClient) -> None:
    prompts = [Prompt(text=PROMPT), Prompt(token_ids=PROMPT_IDS), Prompt(text="1")]
    groups = list(client.rollouts(prompts, max_tokens=30, group_size=6, reward="ones"))
    assert sorted(group.index for group in groups) == [0, 1, 2]
    for group in groups:
        assert isinstance(group, ScoredGroup)
        assert group.prompt_ids == (PROMPT_IDS if group.index < 2 else [4])
        assert len(group.completions) == 6
        for completion in group.completions:
            length = len(completion.token_ids)
            assert len(completion.logprobs) == length <= 30
            assert completion.truncated == (completion.token_ids[-1] != 2)
            assert [(span.version, span.start, span.stop) for span in completion.versions] == [(0, 0, length)]
            assert completion.parts == {"ones": completion.text.count("1"), "short": -0.01 * length}
            assert completion.reward == pytest.approx(sum(completion.parts.values()))


def test_a_group_whose_reward_fails_is_one_line_of_the_answer(client: ServiceClient) -> None:
    prompts = [Prompt(text=PROMPT, problem={"hang": True}), Prompt(text=PROMPT)]
    by_index = {group.index: group for group in client.rollouts(prompts, max_tokens=5, reward="ones")}
    failed = by_index[0]
    assert isinstance(failed, FailedGroup)
    assert (failed.error.code, failed.error.param) == (422, "reward")
    assert "took longer than 1.5 s and was killed" in failed.error.message
    assert isinstance(by_index[1], ScoredGroup)


def test_a_group_has_a_deadline(client: ServiceClient) -> None:
    (late,) = client.rollouts([Prompt(text=PROMPT)], max_tokens=390, group_size=64, timeout_s=0.001)
    assert isinstance(late, FailedGroup)
    assert late.error.code == 504


GOOD_ROLLOUT: dict[str, Any] = {"prompts": [{"text": PROMPT}], "sampling": {"max_tokens": 4}}
BAD: list[tuple[Any, int, str, str | None]] = [
    (b"{", 400, "no JSON", None),
    (b"[" * 100_000, 400, "got `array`", None),
    (b'{"prompts": [{"text": "1", "problem": {"a": ' + b"[" * 100_000, 400, "no JSON", None),
    (b"{}", 400, "missing required field `prompts`", None),
    ({"prompts": []}, 400, "length >= 1", "prompts"),
    ({"prompt": "x"}, 400, "unknown field `prompt`", None),
    ({"sampling": {"max_tokens": 4, "top_p": 0.9}}, 400, "every importance ratio would be wrong", "sampling"),
    ({"sampling": {"max_tokens": 4, "logit_bias": {}}}, 400, "there is no logit_bias", "sampling"),
    ({"sampling": {"max_tokens": 0}}, 400, ">= 1", "sampling.max_tokens"),
    ({"sampling": {"max_tokens": 4, "temperature": -1}}, 400, ">= 0", "sampling.temperature"),
    ({"group_size": 0}, 400, ">= 1", "group_size"),
    ({"prompts": [{"text": "1"}] * 40, "group_size": 4096}, 400, "at most 65536", "group_size"),
    ({"reward": "none such"}, 400, "expected one of code, format, judge, length, math, ones", "reward"),
    ({"reward": "judge"}, 400, "reward 'judge' cannot be used here", "reward"),
    ({"prompts": [{"text": "1"}, {}]}, 400, "one of text, messages and token_ids, got 0", "prompts[1]"),
    ({"prompts": [{"text": "1", "token_ids": [4]}]}, 400, "got 2", "prompts[0]"),
    ({"prompts": [{"text": ""}]}, 400, "is empty", "prompts[0]"),
    ({"prompts": [{"token_ids": [4, 99]}]}, 400, "token id 99 is not of 0 to 31", "prompts[0]"),
    ({"prompts": [{"token_ids": [-1]}]}, 400, "token id -1", "prompts[0]"),
    ({"prompts": [{"text": "1" * 400}]}, 400, "has 400 tokens, and the context 400", "prompts[0]"),
    ({"prompts": [{"messages": [{"role": "user", "content": "1"}]}]}, 400, "no chat template", "prompts[0]"),
]


@pytest.mark.parametrize(("fields", "status", "reason", "param"), BAD)
def test_rollouts_say_what_is_wrong(service: Any, fields: Any, status: int, reason: str, param: str | None) -> None:
    answer = post(service, "/v1/rollouts", fields, GOOD_ROLLOUT)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, status, param)
    assert reason in error["message"]


def test_only_json_is_read(service: Any) -> None:
    """What a page of another origin may send without asking is text."""
    assert curl(service, "/v1/rollouts", "-H", "content-type: text/plain", "-d", "{}")[0] == 415


def test_who_leaves_is_not_generated_for(client: ServiceClient, service: Any) -> None:
    listening = client.rollouts([Prompt(text=PROMPT)] * 200, max_tokens=300, group_size=8)
    next(listening)
    listening.close()
    deadline = time.monotonic() + DEADLINE_S
    while metric(service, "echelon_requests_inside") > 1:  # the one that asks
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while metric(service, "vllm:num_requests_running") + metric(service, "vllm:num_requests_waiting") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---------------------------------------------------------------- keys and doors


def test_keys(service: Any) -> None:
    assert curl(service, "/health", key="")[0] == 200
    assert curl(service, "/ready", key="")[0] == 200
    assert curl(service, "/v1/models", key="no-such-key-at-all")[0] == 401
    assert curl(service, "/v1/weights/load", "-X", "POST")[0] == 403
    with service.client("no-such-key-at-all") as stranger, pytest.raises(RequestFailed, match="401: a key is needed"):
        stranger.weights()


@pytest.mark.parametrize(
    "path", ["/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/v1/load_lora_adapter", "/pause", "/docs"]
)
def test_vllms_management_is_not_reached(service: Any, path: str) -> None:
    """The service was started with vLLM's development mode."""
    for key in (API_KEY, ADMIN_KEY):
        assert curl(service, path, "-X", "POST", key=key)[0] == 404


# ---------------------------------------------------------------- weights


def test_weights_change_under_load_and_nothing_is_lost(
    service: Any, operator: ServiceClient, asked: openai.OpenAI, folders: list[Path], reference: Callable
) -> None:
    both = [weights_of(folder) for folder in folders]
    groups: list[ScoredGroup] = []
    over = threading.Event()

    def complete(streaming: bool) -> int:
        how: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
        finished = 0
        while not over.is_set():
            answers = (
                [*asked.completions.create(**how, stream=True)] if streaming else [asked.completions.create(**how)]
            )
            assert answers[-1].choices[0].finish_reason == "length"
            finished += 1
        return finished

    def roll() -> None:
        with service.client() as own:
            while not over.is_set():
                for group in own.rollouts([Prompt(text=PROMPT)] * 3, max_tokens=120, group_size=4):
                    assert isinstance(group, ScoredGroup)
                    groups.append(group)

    def some_more(futures: "list[Future[Any]]") -> None:
        """By groups, not by seconds: a slow machine must see as many under each version."""
        deadline, goal = time.monotonic() + DEADLINE_S, len(groups) + 8
        while len(groups) < goal and not any(each.done() for each in futures):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with ThreadPoolExecutor(6) as pool:
        lanes: list[Future[Any]] = [pool.submit(complete, lane % 2 == 0) for lane in range(4)]
        futures = lanes + [pool.submit(roll) for _ in range(2)]
        try:
            for version in range(1, 6):
                some_more(futures)
                assert operator.load(str(folders[version % 2])).version == version
            some_more(futures)
        finally:
            over.set()
        assert sum(lane.result(DEADLINE_S) for lane in lanes) > 4
        for each in futures:
            each.result(DEADLINE_S)
    completions = [one for group in groups for one in group.completions]
    assert {span.version for one in completions for span in one.versions} == set(range(6))
    assert any(len(one.versions) > 1 for one in completions)
    for one in completions:
        check_versions(one, both, reference)
    now = operator.weights()
    assert (now.version, now.updates, now.refused, now.source) == (5, 5, 0, str(folders[1]))
    assert metric(service, "echelon_weights_version") == 5


def test_what_cannot_be_loaded_is_said_and_the_old_weights_serve_on(
    operator: ServiceClient, service: Any, tmp_path: Path
) -> None:
    before = operator.weights().version
    with pytest.raises(RequestFailed, match="400: there is no folder"):
        operator.load("/no/such/folder")
    with pytest.raises(RequestFailed, match=r"400: .* is no model's folder"):
        operator.load(str(tmp_path))
    with pytest.raises(RequestFailed, match=r"400: .+"):
        operator.follow(str(tmp_path))
    write_other_shape(tmp_path / "other")
    with pytest.raises(RequestFailed, match=r"409: version .* refused: tensor"):
        operator.load(str(tmp_path / "other"))
    now = operator.weights()
    assert (now.version, now.refused) == (before, 1)
    assert "refused" in now.problem


def test_a_run_is_followed(operator: ServiceClient, client: ServiceClient, tiny_model: Path, tmp_path: Path) -> None:
    """A real one, of this model. Its versions are smaller than the one that is served, and another run's."""
    assert operator.load(str(tiny_model), version=1000).version == 1000
    recipe = write_recipe(tmp_path, tiny_model)
    words = [sys.executable, "-m", "echelon", "run", str(recipe), "--run-dir", str(tmp_path / "run")]
    with (tmp_path / "run.log").open("w") as log:
        run = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        seen = follow_to_the_end(operator, client, tmp_path, run)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0, (tmp_path / "run.log").read_text()
    now = operator.weights()
    assert seen == sorted(seen)
    assert 6 >= now.version >= seen[-1] >= 1
    assert (now.following, now.source) == (None, str(tmp_path / "run"))
    assert "is followed no longer: the run" in now.problem


def follow_to_the_end(operator: ServiceClient, client: ServiceClient, folder: Path, run: Any) -> list[int]:
    """Versions that completions had, while the run went on; it waits in its first steps for a trained one."""
    deadline = time.monotonic() + RUN_S

    def in_time() -> None:
        assert time.monotonic() < deadline, (operator.weights(), (folder / "run.log").read_text())
        time.sleep(0.1)

    name = str(folder / "run")
    while not follows(operator, name):
        assert run.poll() is None, (folder / "run.log").read_text()
        in_time()
    seen: list[int] = []
    while (now := operator.weights()).following is not None:
        if now.source == name:
            (group,) = client.rollouts([Prompt(text=PROMPT)], max_tokens=4)
            assert isinstance(group, ScoredGroup)
            seen.append(group.completions[0].versions[-1].version)
            if seen[-1] >= 1:
                (folder / "seen").touch()
        in_time()
    run.wait(max(1.0, deadline - time.monotonic()))
    return seen


def follows(operator: ServiceClient, run: str) -> bool:
    """Not before it listens."""
    try:
        return operator.follow(run).following == run
    except RequestFailed:
        return False


def test_metrics(service: Any, client: ServiceClient) -> None:
    counted = {"done": 0.0, "failed": 0.0}
    before = {outcome: metric(service, "echelon_rollout_groups_total", outcome=outcome) for outcome in counted}
    for prompt in (Prompt(text=PROMPT), Prompt(text=PROMPT, problem={"hang": True})):
        list(client.rollouts([prompt], max_tokens=200, group_size=4, reward="ones"))
    after = {outcome: metric(service, "echelon_rollout_groups_total", outcome=outcome) for outcome in counted}
    assert {outcome: after[outcome] - before[outcome] for outcome in counted} == {"done": 1, "failed": 1}
    refused = metric(service, "echelon_requests_refused_total", status="404")
    assert curl(service, "/sleep", "-X", "POST")[0] == 404
    assert metric(service, "echelon_requests_refused_total", status="404") == refused + 1
    assert metric(service, "echelon_scoring_total", reward="ones", what="ones.failed") >= 1
    assert metric(service, "echelon_drafting", what="drafted") > 0
    assert metric(service, "vllm:generation_tokens_total") > 0


# ---------------------------------------------------------------- the end; it has to come last


def test_it_drains_and_leaves_nobody(service: Any, asked: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 380, "extra_body": {"ignore_eos": True}}
    streams = [iter(asked.completions.create(**body, stream=True)) for _ in range(4)]
    for stream in streams:
        next(stream)
    ended = threading.Thread(target=service.end)
    ended.start()
    last = [list(stream)[-1].choices[0].finish_reason for stream in streams]
    assert last == ["length"] * 4
    ended.join(DEADLINE_S)
    assert service.process.returncode == 0, service.log()
    assert not service.survivors()
    with service.client() as late, pytest.raises(ServiceUnreachable, match="cannot reach"):
        late.weights()


# ---------------------------------------------------------------- helpers


def metric(service: Any, name: str, **labels: str) -> float:
    """Its value, summed over the labels that are not named."""
    from prometheus_client.parser import text_string_to_metric_families

    status, text = curl(service, "/metrics")
    assert status == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = [each.value for each in samples if each.name == name and labels.items() <= each.labels.items()]
    assert found or labels, f"no metric {name}"
    return sum(found)


def post(service: Any, path: str, fields: Any, good: dict[str, Any]) -> httpx.Response:
    """Args: fields: the whole body, or what is other than in a good one."""
    body = fields if isinstance(fields, bytes) else json.dumps(good | fields)
    headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
    return httpx.post(service.url + path, content=body, headers=headers, timeout=DEADLINE_S)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def check_versions(one: ScoredCompletion, both: list[dict[str, torch.Tensor]], reference: Callable) -> None:
    """Spans follow one another, and tokens of the first are those weights' own; even versions are the first model's."""
    assert one.versions[0].start == 0
    assert one.versions[-1].stop == len(one.token_ids)
    for before, after in zip(one.versions, one.versions[1:], strict=False):
        assert before.stop == after.start
        assert before.version < after.version
    first = one.versions[0]
    ids = np.array(one.token_ids, np.int32)
    whole = Completion(token_ids=ids, logprobs=ids, versions=ids, truncated=one.truncated)
    expected = reference(both[first.version % 2], tuple(PROMPT_IDS), whole, 1.0)
    np.testing.assert_allclose(one.logprobs[: first.stop], expected[: first.stop], atol=TOLERANCE)


def write_other_shape(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def write_recipe(folder: Path, model: Path) -> Path:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(9) for b in range(5)))
    recipe = folder / "recipe.py"
    recipe.write_text(f"""
import time
from pathlib import Path

from echelon.config import DataConfig, RunConfig, WandbConfig
from learner.config import LearnerConfig
from rewards.config import RewardConfig
from rollout.config import RolloutConfig

HERE = Path({str(folder)!r})

def reward(sample):
    with (HERE / "scored").open("a") as file:
        file.write(".")
        file.flush()
        scored = file.tell()
    while scored > 48 and not (HERE / "seen").exists():  # of three batches
        time.sleep(0.05)
    return float(sample.completion.count("1"))

def recipe():
    return RunConfig(
        model={str(model)!r}, data=DataConfig(train={str(data)!r}), group_size=4, batch_groups=4,
        reward=RewardConfig(function=f"{{__file__}}:reward", timeout_s=300.0),
        rollout=RolloutConfig(engine="small", max_sequences=32, context_tokens=64, max_tokens=12),
        learner=LearnerConfig(steps=6, lr=1e-3), wandb=WandbConfig(mode="disabled"),
    )
""")
    return recipe
