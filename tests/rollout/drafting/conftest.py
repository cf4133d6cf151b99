"""One real engine for all tests of this folder; each says which drafter of `stand_in` it wants."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from enumerable import CONFIG, DRAFT, Drafting, EnumerableEngine, write_enumerable_model


@pytest.fixture(scope="session")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafting]:
    folder = tmp_path_factory.mktemp("enumerable")
    write_enumerable_model(folder)
    engine = EnumerableEngine(CONFIG, str(folder), seed=1, version=3, draft=DRAFT)
    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(engine.start(), 200))
        yield Drafting(engine, runner, folder)
        runner.run(asyncio.wait_for(engine.close(), 60))


@pytest.fixture(scope="session")
def enumerable(drafting: Drafting) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(drafting.folder, dtype=torch.float32).eval()
