import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import constants

from echelon.config import DataConfig, RunConfig
from echelon.hub import OFFLINE_VARIABLE, needs_hub, use_cache_if_offline


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFLINE_VARIABLE, "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def urlopen(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        if error is not None:
            raise error
        return io.BytesIO()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_without_network_the_cache_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, urllib.error.URLError("Name or service not known"))
    use_cache_if_offline()
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("error", [None, urllib.error.HTTPError("", 403, "Forbidden", {}, None)])  # type: ignore[arg-type]
def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    answer(monkeypatch, error)
    use_cache_if_offline()
    assert not constants.HF_HUB_OFFLINE


def test_files_need_no_hub(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    data = DataConfig(train=str(tmp_path / "train.jsonl"))
    assert not needs_hub(RunConfig(model=str(tmp_path), data=data))
    assert needs_hub(RunConfig(model="org/name", data=data))
    assert needs_hub(RunConfig(model=str(tmp_path), data=DataConfig(train="org/data")))
