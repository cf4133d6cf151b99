"""Settings of the service."""

import ipaddress
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from rewards.config import RewardConfig
from rollout.config import DraftConfig, RolloutConfig


class ServiceConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `echelon serve` is told.

    model: folder or hub id. served_name: what requests call it; "": as `model`. port: 0 takes one that is free.
    api_key_file: for what generates and reads; None: no key is asked for, which only loopback allows.
    admin_key_file: for what changes weights; None: nothing does.
    drain_s: after SIGTERM, how long requests that have begun may take.
    rollout: of its settings those of the engine count. reward: settings of the built-in rewards, and of their pools.
    functions: rewards beyond the built-ins, `PATH.py:FUNCTION` by name, relative to `base_dir`.
    """

    model: str
    served_name: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_key_file: str | None = None
    admin_key_file: str | None = None
    drain_s: Annotated[float, Meta(ge=0)] = 30.0
    seed: int = 0
    rollout: RolloutConfig = RolloutConfig()
    draft: DraftConfig = DraftConfig()
    reward: RewardConfig = RewardConfig()
    functions: dict[str, str] = {}
    base_dir: Path = Path()


def check_exposure(config: ServiceConfig) -> None:
    """Raises: ValueError, one line, where others than this machine could come in without a key."""
    if config.api_key_file is None and not is_loopback(config.host):
        raise ValueError(
            f"--host {config.host} can be reached from other machines: it needs --api-key-file (or --host 127.0.0.1)"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may mean anything
