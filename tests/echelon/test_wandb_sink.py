import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echelon import wandb_sink
from echelon.config import DataConfig, RunConfig, WandbConfig
from echelon.run_folder import RunFolder
from echelon.wandb_sink import WandbSink, has_api_key

ROWS = [{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": 0.6}]
SAMPLE = {"step": 0, "prompt": "1+1=", "token_ids": [5, 2], "reward": 1.0, "truncated": False, "versions": [0]}


@pytest.fixture(autouse=True)
def without_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def make_sink(tmp_path: Path, mode: str) -> WandbSink:
    wandb = WandbConfig(mode=mode, samples_every=1)  # type: ignore[arg-type]
    config = RunConfig(model="org/name", data=DataConfig(train="org/data"), wandb=wandb)
    folder = RunFolder(tmp_path)
    folder.samples_file.write_text(json.dumps(SAMPLE) + "\n")
    return WandbSink(config, folder, "run-1")


class FakeWandb(SimpleNamespace):
    """Stands for the module: keeps what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(logged=[], settings={}, finished=False)
        self._error = error

    def init(self, **settings: Any) -> "FakeWandb":
        if self._error is not None:
            raise self._error
        self.settings = settings
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True

    Settings = Table = dict


def run(sink: WandbSink) -> list[str]:
    sink.start()
    sink.log(ROWS)
    sink.close()
    return sink.warnings()


def test_rows_and_samples_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    assert run(make_sink(tmp_path, "offline")) == []
    assert fake.logged[:2] == [(0, {"reward/mean": 0.5}), (1, {"reward/mean": 0.6})]
    (step, logged) = fake.logged[2]
    assert step == 0
    assert logged["samples"]["data"] == [[0, "1+1=", "5 2", 1.0, False, "0"]]  # no tokenizer in this folder
    assert fake.finished
    assert (fake.settings["mode"], fake.settings["id"]) == ("offline", "run-1")


def test_online_without_a_key_is_offline_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    warnings = run(make_sink(tmp_path, "online"))
    assert fake.settings["mode"] == "offline"
    assert len(warnings) == 1
    assert "no API key, so offline" in warnings[0]


def test_a_failure_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(OSError("disk\nfull")))  # type: ignore[arg-type]
    warnings = run(make_sink(tmp_path, "offline"))
    assert warnings == ["wandb stopped: disk full (the run goes on; metrics.jsonl has everything)"]


def test_one_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    gate = threading.Event()
    fake = FakeWandb()
    monkeypatch.setattr(fake, "finish", lambda: gate.wait(20), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(wandb_sink, "CLOSE_S", 0.3)
    try:
        assert "wandb did not finish" in run(make_sink(tmp_path, "offline"))[0]
    finally:
        gate.set()


def test_disabled_imports_nothing(tmp_path: Path) -> None:
    assert run(make_sink(tmp_path, "disabled")) == []
    code = "import sys, echelon.wandb_sink; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_keys_are_found_in_environment_and_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_api_key()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example login user password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert has_api_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_api_key()
