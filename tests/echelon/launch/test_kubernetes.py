"""The example for Kubernetes: would the command line take what it runs?"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from echelon.cli import parse
from echelon.commands.keys import FOR_A_WORKER
from echelon.config import DataConfig, RunConfig
from echelon.overrides import apply_overrides
from echelon.validate import validate

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide"


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    loaded = yaml.safe_load_all((GUIDE / "kubernetes.yaml").read_text())
    return {each["kind"]: each for each in loaded}


def pod(of: dict[str, Any]) -> dict[str, Any]:
    return of["spec"]["template"]["spec"]


def test_the_run_listens_where_its_service_says(objects: dict[str, Any]) -> None:
    script = pod(objects["Job"])["containers"][0]["args"][0]
    words = shlex.split(script.partition("exec echelon ")[2].replace("$RESUME", "--resume"))
    args = parse(words)
    assert (args.command, args.resume, args.on) == ("run", True, "local")
    config = apply_overrides(RunConfig(model="org/name", data=DataConfig(train="org/data")), args.overrides)
    validate(config)
    assert config.bus.encrypted
    port = objects["Service"]["spec"]["ports"][0]["port"]
    assert config.bus.address == f"tcp://0.0.0.0:{port}"
    assert pod(objects["Job"])["containers"][0]["readinessProbe"]["tcpSocket"]["port"] == port


def test_workers_join_by_the_name_of_the_service(objects: dict[str, Any]) -> None:
    worker = pod(objects["Deployment"])["containers"][0]
    args = parse(worker["args"])
    name, port = objects["Service"]["metadata"]["name"], objects["Service"]["spec"]["ports"][0]["port"]
    assert (args.command, args.join) == ("worker", f"tcp://{name}:{port}")
    selected = objects["Service"]["spec"]["selector"]
    assert selected == objects["Job"]["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("kind", ["Job", "Deployment"])
def test_what_is_mounted_is_there_and_keys_are_private(objects: dict[str, Any], kind: str) -> None:
    described = pod(objects[kind])
    volumes = {volume["name"]: volume for volume in described["volumes"]}
    assert {mount["name"] for mount in described["containers"][0]["volumeMounts"]} == volumes.keys()
    assert volumes["keys"]["secret"]["defaultMode"] & 0o077 == 0
    assert described["terminationGracePeriodSeconds"] > RunConfig(model="m", data=DataConfig(train="d")).rollout.drain_s


def test_the_workers_secret_has_the_keys_of_a_worker() -> None:
    text = (GUIDE / "kubernetes.md").read_text()
    secret = text.partition("echelon-worker-keys")[2].partition("kubectl create configmap")[0]
    assert tuple(re.findall(r"--from-file=keys/(\S+)", secret)) == FOR_A_WORKER
