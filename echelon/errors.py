"""How a role reports that it failed: RUN_DIR/logs/ROLE.error.json, which the supervisor reads.

user          what a user wrote cannot work (exit code 2)
runtime       anything else that ended the role (exit code 1)
consequence   the role ended because another one had: never the first cause while there is another (exit code 1)
"""

import faulthandler
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from databus.process import die_with_parent
from echelon.files import write_atomically

logger = logging.getLogger(__name__)

Kind = Literal["user", "runtime", "consequence"]
EXIT_CODES: dict[Kind, int] = {"user": 2, "runtime": 1, "consequence": 1}
SIGTERM_CODE = 128 + signal.SIGTERM


class FollowsAnother(RuntimeError):
    """This role ends because another one has; that one may say why."""


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """time: seconds since the epoch. message: one line for a person."""

    time: float
    role: str
    kind: Kind
    message: str


def write_error(file: Path, report: ErrorReport) -> None:
    """The first report of a role stands: later ones are its consequences."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, msgspec.json.encode(report))


def read_error(file: Path) -> ErrorReport | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=ErrorReport)
    except (OSError, msgspec.MsgspecError):
        return None


def role_main(
    role: str,
    error_file: Path | None,
    body: Callable[[], None],
    consequences: Callable[[], tuple[type[BaseException], ...]] = lambda: (),
    independent: bool = False,
) -> int:
    """Run a role to its end; its exit code. The log goes to stderr, which the supervisor keeps in logs/ROLE.log.

    Args: consequences: the exceptions, asked for when one was raised, that say that another role failed first.
        independent: somebody started it by hand, so it outlives the shell that it was started from.
    """
    if not independent:
        die_with_parent()
    set_up_logging(role)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the watchdog asks every role where it stands
    told_to_leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _leave(told_to_leave))
    try:
        body()
    except Exception as error:
        if told_to_leave.is_set():  # whatever was under way was cut short; some libraries wrap what cuts it
            logger.info("told to stop (%s)", message_of(error))
            return SIGTERM_CODE
        logger.exception("%s failed", role)
        report = ErrorReport(time=time.time(), role=role, kind=_kind(error, consequences()), message=message_of(error))
        if error_file is not None:
            write_error(error_file, report)
        return EXIT_CODES[report.kind]
    return 0


def set_up_logging(role: str) -> None:
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s",
        force=True,
    )


def message_of(error: BaseException) -> str:
    """One line; our own errors are written for people, others say what they are."""
    text = " ".join(str(error).split())
    ours = isinstance(error, ValueError | RuntimeError) or type(error).__module__.split(".")[0] in OUR_PACKAGES
    return text if ours and text else f"{type(error).__name__}: {text}".rstrip(": ")


OUR_PACKAGES = ("databus", "rewards", "rollout", "learner", "echelon")


def _kind(error: BaseException, consequences: tuple[type[BaseException], ...]) -> Kind:
    """An error that was raised while a consequence was handled is one itself."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, consequences):
            return "consequence"
        link = link.__cause__ or link.__context__
    return "user" if isinstance(error, ValueError) else "runtime"


def _leave(told_to_leave: threading.Event) -> None:
    told_to_leave.set()
    sys.exit(SIGTERM_CODE)
