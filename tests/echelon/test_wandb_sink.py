import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echelon import wandb_sink
from echelon.config import DataConfig, RunConfig, WandbConfig
from echelon.git_state import git_state
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
        super().__init__(logged=[], settings={}, finished=False, resumed=False, step=0)
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
    (step, logged) = fake.logged[0]
    assert (step, logged["reward/mean"]) == (0, 0.5)
    assert logged["samples"]["data"] == [[0, "1+1=", "5 2", 1.0, False, "0"]]  # no tokenizer in this folder
    assert fake.logged[1:] == [(1, {"reward/mean": 0.6})]
    assert fake.finished
    assert (fake.settings["mode"], fake.settings["id"]) == ("offline", "run-1")


def test_a_resumed_run_says_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's rows are read from its beginning again; wandb knows of step 0 already."""
    fake = FakeWandb()
    fake.resumed, fake.step = True, 1
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    assert run(make_sink(tmp_path, "offline")) == []
    assert fake.logged == [(1, {"reward/mean": 0.6})]
    assert fake.settings["resume"] == "allow"


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


def finished_records(folder: Path, within_s: float = 60.0) -> list[Any]:
    """All records of the one run: wandb's service writes the last of them after `finish` has returned."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        records = read_offline(folder)
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"the end of wandb's run was not written within {within_s:.0f} s")


def read_offline(folder: Path) -> list[Any]:
    """Records of the one run that wandb wrote below `folder`: a LevelDB log of protobufs, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, parts, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_the_real_wandb_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_sink, "CLOSE_S", 120.0)
    sink = make_sink(tmp_path, "offline")
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(SAMPLE | {"step": 1, "prompt": "2+2="}) + "\n")
    assert run(sink) == []
    records = finished_records(tmp_path)
    (started,) = (record.run for record in records if record.HasField("run"))
    assert (started.run_id, started.project, started.display_name) == ("run-1", "echelon", tmp_path.name)
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["model"] == "org/name" and config["learner"]["steps"] == 100
    assert config["git"] == git_state(Path(__file__).parent) and len(config["git"]["commit"]) == 40
    assert started.git.commit == config["git"]["commit"]
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["reward/mean"]) for row in history] == [(0, 0.5), (1, 0.6)]
    for row, prompt in zip(history, ("1+1=", "2+2="), strict=True):
        (table,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['samples.path']}")
        content = json.loads(table.read_text())
        assert content["columns"] == wandb_sink.COLUMNS
        assert content["data"] == [[row["_step"], prompt, "5 2", 1.0, False, "0"]]
