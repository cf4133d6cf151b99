"""One real `echelon serve` for all tests that need one: its start takes half a minute."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rollout.service.client import ServiceClient

ROOT = Path(__file__).resolve().parents[3]
START_S = 300.0
END_S = 90.0
API_KEY, ADMIN_KEY = "the-key-of-all-users", "the-key-of-operators"
NAME = "tiny"
CONTEXT_TOKENS = 400

REWARDS = """
def ones(sample):
    if sample.problem.get("hang"):
        while True: pass
    return {"ones": float(sample.completion.count("1")), "short": -0.01 * sample.num_tokens}
"""


class Service:
    """`echelon serve` as a process."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.log_file = folder / "log"
        self.folder = folder
        for name, key in (("api", API_KEY), ("admin", ADMIN_KEY)):
            file = folder / f"{name}.key"
            file.write_text(key)
            file.chmod(0o600)
        (folder / "rewards.py").write_text(REWARDS)
        (folder / "reward.json").write_text('{"timeout_s": 1.5, "processes": 1}')
        words = [
            *(sys.executable, "-m", "echelon", "serve", str(model), "--served-name", NAME, "--port", "0"),
            *("--api-key-file", str(folder / "api.key"), "--admin-key-file", str(folder / "admin.key")),
            *("--context-tokens", str(CONTEXT_TOKENS), "--max-sequences", "64", "--draft", "logarithmic"),
            *("--reward", str(folder / "rewards.py") + ":ones", "--reward-config", str(folder / "reward.json")),
        ]
        # its development mode has vLLM offer all that must not be reached
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with self.log_file.open("w") as log, (folder / "out").open("w") as out:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=out, stderr=log, start_new_session=True
            )
        self.url = self._url()
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def _url(self) -> str:
        """Its first line; a process that ends without one says why in its log."""
        deadline = time.monotonic() + START_S
        while not (line := (self.folder / "out").read_text()).endswith("\n"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no service:\n{self.log()}")
            time.sleep(0.1)
        assert line.startswith("ready at "), line
        return line.split()[-1]

    def client(self, key: str = API_KEY) -> ServiceClient:
        return ServiceClient(self.url, key)

    def log(self) -> str:
        return self.log_file.read_text()[-4000:]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S)

    def survivors(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(self.family, timeout=20.0)
        return alive

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(END_S)


@pytest.fixture(scope="module")
def service(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    served = Service(tmp_path_factory.mktemp("service"), tiny_model)
    try:
        yield served
    finally:
        served.kill()
        assert not served.survivors()
