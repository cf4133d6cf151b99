"""Fixtures for all tests: a tiny model on disk; no thread outlives its test."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from databus.broker import Broker
from databus.client import BusClient
from databus.messages import Welcome

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of OpenMP spin while they wait for each other: with two tests at a time, all would wait ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHARACTERS = "0123456789+=;#"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines first: with files handed out one by one, the last ones are then short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the brokers and clients that a test started in threads: the tests after it would be slower for each."""
    brokers: list[tuple[Broker, threading.Thread]] = []
    clients: list[BusClient] = []
    run, connect = Broker.run, BusClient.connect

    def run_and_remember(broker: Broker) -> None:
        brokers.append((broker, threading.current_thread()))
        run(broker)

    def connect_and_remember(client: BusClient, timeout_s: float) -> Welcome:
        clients.append(client)
        return connect(client, timeout_s)

    def end(*_: Any) -> None:
        raise RuntimeError("the test is over")

    monkeypatch.setattr(Broker, "run", run_and_remember)
    monkeypatch.setattr(BusClient, "connect", connect_and_remember)
    yield
    for client in clients:
        if client._thread.is_alive():
            client.close()
    left = [
        (broker, thread) for broker, thread in brokers if thread.is_alive() and thread is not threading.main_thread()
    ]
    for broker, _ in left:
        broker._turn = end  # type: ignore[method-assign]
    for _, thread in left:
        thread.join(10.0)
        assert not thread.is_alive(), "a broker did not end"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers and vLLM load: a random two-layer Qwen3 in fp32 and a character tokenizer.

    Weights are drawn wide enough that its distributions are far from uniform. <eos> ends a completion; the
    tokenizer adds no special token by itself.
    """
    folder = tmp_path_factory.mktemp("tiny_model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model`, with other weights."""
    folder = tmp_path_factory.mktemp("other_model")
    write_tiny_model(folder, seed=1)
    return folder


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        pad_token_id=VOCABULARY["<pad>"],
        bos_token_id=VOCABULARY["<bos>"],
        eos_token_id=VOCABULARY["<eos>"],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=VOCABULARY["<pad>"], bos_token_id=VOCABULARY["<bos>"], eos_token_id=VOCABULARY["<eos>"]
    )
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.save_pretrained(folder)
