"""The settings of a run whose roles are on several machines."""

import ipaddress

import msgspec

from echelon.config import RunConfig
from echelon.validate import validate


def placed_elsewhere(config: RunConfig, host: str) -> RunConfig:
    """`bus.address=auto` listens where the others reach it, with keys. Args: host: address of this machine.

    Raises: ValueError, in one line, for settings that only one machine can have.
    """
    if config.bus.address.startswith("ipc://"):
        raise ValueError(f"bus.address={config.bus.address} is of this machine: with --on use auto or tcp://HOST:PORT")
    if config.learner.memory_copy_every > 0:
        raise ValueError("learner.memory_copy_every needs a learner on this machine: set it to 0 with --on")
    if config.placement == "colocated":
        raise ValueError("placement is colocated, for one machine: set it to separate with --on, or start it there")
    if config.bus.address == "auto":
        address = f"tcp://{bracketed(host)}:*"
        config = msgspec.structs.replace(config, bus=msgspec.structs.replace(config.bus, address=address))
    validate(config)
    return config


def bracketed(host: str) -> str:
    """An IPv6 address as addresses with a port have it."""
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
