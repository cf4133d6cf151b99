"""Workers from elsewhere: what they need, and that they come and go while a run goes on."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from echelon.commands.keys import FOR_A_WORKER
from echelon.config import DataConfig, RunConfig
from echelon.joining import check_has_all, find_run, with_model, with_recipe
from echelon.roles.worker import Membership
from echelon.run_folder import BusRecord, RunFolder
from rewards.config import RewardConfig

ROOT = Path(__file__).resolve().parents[2]


def membership(tmp_path: Path, model: str = "org/name", reward: str = "math") -> Membership:
    config = RunConfig(model=model, data=DataConfig(train="org/data"), reward=RewardConfig(function=reward))
    return Membership(config=config, bus=BusRecord(address="ipc:///x", run_id="r"), reward_dir=tmp_path / "run")


def test_hub_model_and_built_in_reward_need_nothing(tmp_path: Path) -> None:
    check_has_all(membership(tmp_path))


def test_missing_model_is_named_with_what_to_do(tmp_path: Path) -> None:
    run = membership(tmp_path, model="/elsewhere/model")
    with pytest.raises(ValueError, match=r"model /elsewhere/model is not on this machine: .*--model"):
        check_has_all(run)
    check_has_all(with_model(run, str(tmp_path)))


def test_missing_reward_is_named_with_what_to_do(tmp_path: Path) -> None:
    run = membership(tmp_path, reward="recipe.py:reward")
    with pytest.raises(ValueError, match=r"recipe\.py:reward, is not on this machine: name the recipe with --recipe"):
        check_has_all(run)
    recipe = tmp_path / "mine.py"
    recipe.write_text("")
    assert with_recipe(run, recipe).config.reward.function == f"{recipe}:reward"
    check_has_all(with_recipe(run, recipe))
    other = membership(tmp_path, reward="/elsewhere/rewards.py:f")
    with pytest.raises(ValueError, match=r"copy it to the same path"):
        check_has_all(with_recipe(other, recipe))


def test_other_machines_need_keys() -> None:
    with pytest.raises(ValueError, match=r"--join tcp://10\.0\.0\.1:5555 needs --keys DIR"):
        find_run("tcp://10.0.0.1:5555", None)


def test_folder_without_the_right_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"observer\.key cannot be read"):
        find_run("tcp://10.0.0.1:5555", tmp_path)


def test_no_run_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run's folder"):
        find_run(str(tmp_path), None)


def test_keys_of_a_run_are_made_once_and_only_where_needed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    bus = membership(tmp_path).config.bus
    folder.make_keys(bus)
    assert not folder.own_keys.exists()
    tcp = msgspec.structs.replace(bus, address="tcp://127.0.0.1:*")
    folder.make_keys(msgspec.structs.replace(tcp, plain=True))
    folder.make_keys(msgspec.structs.replace(tcp, keys=str(tmp_path / "others")))
    assert not folder.own_keys.exists()
    folder.make_keys(tcp)
    before = (folder.own_keys / "worker.key").read_bytes()
    folder.make_keys(tcp)
    assert (folder.own_keys / "worker.key").read_bytes() == before


# ---------------------------------------------------------------- a live run


class Outsider:
    """`echelon worker` with nothing of the run but what a person would copy to another machine."""

    def __init__(self, run: Any, place: Path, name: str, *words: str) -> None:
        keys = place / "keys"
        keys.mkdir(parents=True)
        for file in FOR_A_WORKER:
            shutil.copy(run.folder / "keys" / file, keys / file)
        address = RunFolder(run.folder).bus().address  # type: ignore[union-attr]
        command = [sys.executable, "-m", "echelon", "worker", "--join", address, "--keys", str(keys), "--name", name]
        self.log = place / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([*command, *words], cwd=ROOT, stdout=out, stderr=out)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_join_over_tcp_with_keys_and_leave(write_recipe, start_run, tiny_model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    settings = ("bus.address=tcp://0.0.0.0:*", "learner.steps=10000", "eval.every=0", "bus.lease_s=30")
    run = start_run(recipe, tmp_path / "run", *settings)
    run.wait_for(lambda: len(run.rows()) >= 2)
    model = tmp_path / "elsewhere" / "model"
    shutil.copytree(tiny_model, model)
    here = ("--recipe", str(recipe), "--model", str(model))

    polite = Outsider(run, tmp_path / "polite", "polite", *here)
    rude = Outsider(run, tmp_path / "rude", "rude", *here)
    try:
        for outsider, name in ((polite, "polite"), (rude, "rude")):
            run.wait_for(lambda name=name: (each := run.worker(name)) is not None and each.leased_groups > 0)
            assert outsider.process.poll() is None, outsider.log.read_text()
        assert polite.end(signal.SIGTERM) == 0, polite.log.read_text()
        assert "leaving (told to leave)" in polite.log.read_text()
        assert run.worker("polite") is None
        assert rude.end(signal.SIGKILL) == -signal.SIGKILL
    finally:
        for outsider in (polite, rude):
            outsider.process.kill()
            outsider.process.wait(10)
    before = len(run.rows())
    run.wait_for(lambda: len(run.rows()) >= before + 4)
    assert run.rows()[-1]["ledger/failed_groups"] == 0
    stranger = subprocess.run(
        [sys.executable, "-m", "echelon", "worker", "--join", RunFolder(run.folder).bus().address],  # type: ignore
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (stranger.returncode, stranger.stderr.count("\n")) == (1, 1)
    assert "or it wants another key" in stranger.stderr
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
