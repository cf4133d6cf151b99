"""What the supervisor and a role's actor say to each other; plain values, so that either side may be the newer one."""

import signal

from msgspec import Struct

HOME = "{home}"
"""In a role's arguments: the private folder that its actor makes on the node."""


class NodeFacts(Struct, frozen=True, kw_only=True):
    """A node that a part of a role has got. address: for the others. free_port: at this moment. sees_run: it has the
    run's folder, the same as the supervisor's."""

    address: str
    free_port: int
    sees_run: bool


class RoleOrder(Struct, frozen=True, kw_only=True):
    """What to run: `python -m ARGUMENTS`.

    files: by their path in the private folder; keys are among them, so nobody shows an order. defaults: variables that
    the node's environment overrides. without: variables that the role must not see.
    """

    name: str
    arguments: tuple[str, ...]
    files: dict[str, bytes]
    defaults: dict[str, str]
    without: tuple[str, ...] = ()
    stop_signal: int = signal.SIGTERM

    def __repr__(self) -> str:
        return f"RoleOrder({self.name})"


class RoleEnd(Struct, frozen=True, kw_only=True):
    """How a role ended: as `RunningRole` says it. report: its error file; b"": none."""

    code: int
    killed_by: int | None
    words: str
    report: bytes = b""


class RoleNews(Struct, frozen=True, kw_only=True):
    """What is new of a role. log: what it has said since. end: None while it runs, or has more to say."""

    log: bytes
    end: RoleEnd | None
