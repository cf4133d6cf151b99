import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echelon.errors import ErrorReport, message_of, read_error, write_error

ROLE = """
import sys
from pathlib import Path
from echelon.errors import role_main

class Lost(Exception):
    pass

def consequence():
    try:
        raise Lost("the broker is gone")
    except Lost:
        raise RuntimeError("the run failed") from None

def fail(error):
    raise error

def wait():
    import time
    print("waiting", flush=True)
    time.sleep(60)

sys.exit(role_main("tester", Path(sys.argv[1]), lambda: {body}, consequences=lambda: (Lost,)))
"""


WRAP = """
def wrap():
    try:
        wait()
    except BaseException:
        raise RuntimeError("cut short") from None
"""


def start(body: str, file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ROLE.replace("{body}", body), str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "kind", "message"),
    [
        ("fail(ValueError('model=x: no such\\nfolder'))", 2, "user", "model=x: no such folder"),
        ("fail(RuntimeError('it broke'))", 1, "runtime", "it broke"),
        ("fail(KeyError('x'))", 1, "runtime", "KeyError: 'x'"),
        ("consequence()", 1, "consequence", "the run failed"),
    ],
)
def test_a_failure_is_reported_in_one_line(tmp_path: Path, body: str, code: int, kind: str, message: str) -> None:
    file = tmp_path / "logs" / "tester.error.json"
    process = start(body, file)
    _, log = process.communicate(timeout=30)
    assert process.returncode == code
    report = read_error(file)
    assert report is not None
    assert (report.role, report.kind, report.message) == ("tester", kind, message)
    assert "Traceback" in log
    assert " tester ERROR " in log


def test_success_reports_nothing(tmp_path: Path) -> None:
    process = start("None", tmp_path / "error.json")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert read_error(tmp_path / "error.json") is None


def test_stacks_on_request_and_a_clean_end(tmp_path: Path) -> None:
    process = start("wait()", tmp_path / "error.json")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    _, log = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert "in wait" in log
    assert read_error(tmp_path / "error.json") is None


def test_an_error_that_sigterm_caused_is_no_failure(tmp_path: Path) -> None:
    code = ROLE.replace("def wait", f"{WRAP}\ndef wait").replace("{body}", "wrap()")
    command = [sys.executable, "-c", code, str(tmp_path / "error.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert read_error(tmp_path / "error.json") is None


def test_the_first_report_of_a_role_stands(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    for message in ("first", "second"):
        write_error(file, ErrorReport(time=1.0, role="r", kind="runtime", message=message))
    report = read_error(file)
    assert report is not None
    assert report.message == "first"


def test_a_torn_report_is_none(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text('{"time":')
    assert read_error(tmp_path / "error.json") is None


def test_foreign_errors_say_what_they_are() -> None:
    assert message_of(OSError(28, "No space left on device")) == "OSError: [Errno 28] No space left on device"
    assert message_of(ValueError("a line\nand another")) == "a line and another"
    assert message_of(KeyError()) == "KeyError"
