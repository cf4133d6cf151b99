"""Assertions about a solution that runs in a process of its own: nothing that it prints or patches passes a test.

The tests' process asks the solution's for names, attributes and calls, over pipes; values travel as tagged JSON, and
only plain ones do. What is none, an object of a class, stays where it is, and can be asked for its attributes.
"""

import builtins
import importlib
import json
import os
import select
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

from rewards.jail import linux

LONGEST = 64 << 20
PLAIN = (type(None), bool, int, float, str)


class Unsendable(Exception):
    """A test hands the solution something that cannot be sent: the test's fault."""


def split(task: int, verdict: int) -> Callable[[], None]:
    """Become two processes, before any code of others runs; in each, what it is to do.

    Args: task: a file with {"setup", "tests", "stop"} as JSON. verdict: gets {"passed", ...} as JSON. The solution's
        code is on stdin. Its process has neither of the two, nor ever had what they hold.
    """
    asks, told = os.pipe(), os.pipe()
    verdict_copy, nowhere = os.dup(verdict), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, verdict)
    above = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([above], [], [], 0)[0]:
            os._exit(1)
        for file in (asks[1], told[0], task, verdict_copy, above):
            os.close(file)
        code = os.pread(0, os.fstat(0).st_size, 0).decode()
        return lambda: Solution(asks[0], told[1]).serve(code)
    for file in (asks[0], told[1], above):
        os.close(file)

    def test() -> None:
        work = json.loads(os.pread(task, os.fstat(task).st_size, 0))
        result = Tester(asks[1], told[0]).run(**work)
        os.write(verdict_copy, json.dumps(result).encode())
        os._exit(0)

    return test


# ---------------------------------------------------------------- values


def pack(value: Any, refer: Any) -> Any:
    """A value as JSON; `refer` gives what stands for one that is not plain. Raises: whatever it raises."""
    kind = type(value)
    if kind in PLAIN:
        return value
    for tag, of in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if kind is of:
            return [tag, *(pack(each, refer) for each in value)]
    if isinstance(value, dict):
        return ["d", *([pack(key, refer), pack(each, refer)] for key, each in dict.items(value))]
    if kind is bytes:
        return ["b", value.hex()]
    if kind is complex:
        return ["c", value.real, value.imag]
    return refer(value)


def unpack(packed: Any, dereference: Any) -> Any:
    """The value again. Raises: ValueError for anything else; RecursionError."""
    if type(packed) in PLAIN:
        return packed
    match packed:
        case ["l" | "t" | "s" | "z" as tag, *rest]:
            make: Any = {"l": list, "t": tuple, "s": set, "z": frozenset}[tag]
            return make(unpack(each, dereference) for each in rest)
        case ["d", *pairs]:
            return {unpack(key, dereference): unpack(value, dereference) for key, value in pairs}
        case ["b", str(text)]:
            return bytes.fromhex(text)
        case ["c", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["r", int(place)]:
            return dereference(place)
        case ["m", str(name)]:
            return importlib.import_module(name)
    raise ValueError("not a value")


class Line:
    """JSON lines both ways over two pipes."""

    def __init__(self, reading: int, writing: int) -> None:
        self._in = os.fdopen(reading, "rb")
        self._out = os.fdopen(writing, "wb")

    def send(self, message: Any) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def receive(self) -> Any:
        """Raises: EOFError where the other side has ended; ValueError for what is no JSON."""
        line = self._in.readline(LONGEST)
        if not line.endswith(b"\n"):
            raise EOFError("it has ended")
        return json.loads(line)


# ---------------------------------------------------------------- the solution's process


class Solution:
    """Runs the code, then answers: ["name", name], ["get", object, name], ["call", object, args, named]."""

    def __init__(self, reading: int, writing: int) -> None:
        self._line = Line(reading, writing)
        self._objects: list[Any] = []

    def serve(self, code: str) -> None:
        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        failed = ""
        try:
            exec(compile(code, "solution.py", "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:
            failed = describe(error)
        while True:
            try:
                question = self._line.receive()
            except EOFError:
                os._exit(0)
            try:
                if failed:
                    raise RuntimeError(failed)
                answer = self._answer(question, module.__dict__)
            except BaseException as error:
                answer = ["failed", type(error).__name__, describe(error)]
            self._line.send(answer)

    def _answer(self, question: Any, names: dict[str, Any]) -> Any:
        match question:
            case ["name", str(name)]:
                if name not in names:
                    raise NameError(f"the solution defines no {name!r}")
                return ["value", pack(names[name], self._refer)]
            case ["get", int(place), str(name)]:
                return ["value", pack(getattr(self._objects[place], name), self._refer)]
            case ["call", int(place), list(args), dict(named)]:
                given = [unpack(each, self._objects.__getitem__) for each in args]
                with_names = {name: unpack(each, self._objects.__getitem__) for name, each in named.items()}
                result = pack(self._objects[place](*given, **with_names), self._refer)
                return ["value", result, [pack(each, self._refer) for each in given]]
        raise ValueError("not a question")

    def _refer(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return ["m", value.__name__]
        self._objects.append(value)
        return ["r", len(self._objects) - 1]


# ---------------------------------------------------------------- the tests' process


class Tester:
    """Runs the tests, which the solution never sees."""

    def __init__(self, writing: int, reading: int) -> None:
        self._line = Line(reading, writing)

    def run(self, setup: str, tests: list[str], stop: bool) -> dict[str, Any]:
        """stop: at the first failure. Returns {"passed", "total", "error"}, or {"fault"} for tests that cannot run."""
        try:
            codes = [compile(text, "test", "exec", dont_inherit=True) for text in (setup, *tests)]
        except (SyntaxError, ValueError) as error:
            return {"fault": describe(error)}
        passed, first = 0, ""
        names: dict[str, Any] = Names(self)
        for number, code in enumerate(codes):
            try:
                exec(code, names)
            except Unsendable as error:
                return {"fault": describe(error)}
            except BaseException as error:
                first = first or f"test {number}: {describe(error)}"
                if number == 0:
                    return {"fault": f"setup: {describe(error)}"}
                if stop:
                    break
            else:
                passed += number > 0
        return {"passed": passed, "total": len(tests), "error": first}

    def ask(self, *question: Any) -> Any:
        """What the solution says. Raises: what it raised, or what comes nearest."""
        return self._take(question)[0]

    def call(self, place: int, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A call, whose lists, sets and dicts change here as they have changed there."""
        packed = [pack(each, send) for each in args]
        value, after = self._take(["call", place, packed, {name: pack(each, send) for name, each in named.items()}])
        for given, now in zip(args, after, strict=True):
            change(given, unpack(now, lambda other: Remote(self, other)))
        return value

    def _take(self, question: Any) -> Any:
        self._line.send(question)
        match self._line.receive():
            case ["value", packed, *after]:
                return unpack(packed, lambda place: Remote(self, place)), after[0] if after else []
            case ["failed", str(name), str(text)]:
                known = getattr(builtins, name, None)
                kind = known if isinstance(known, type) and issubclass(known, Exception) else RuntimeError
                raise make_error(kind, text)
        raise ValueError("not an answer")


class Names(dict):
    """The tests' names: what they define themselves, then Python's, then the solution's."""

    def __init__(self, tester: Tester) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._tester = tester

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name) if hasattr(builtins, name) else self._tester.ask("name", name)


class Remote:
    """An object in the solution's process."""

    def __init__(self, tester: Tester, place: int) -> None:
        self.__dict__.update({"-tester": tester, "-place": place})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["-tester"].ask("get", self.__dict__["-place"], name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.__dict__["-tester"].call(self.__dict__["-place"], args, named)


def send(value: Any) -> Any:
    if isinstance(value, Remote):
        return ["r", value.__dict__["-place"]]
    raise Unsendable(f"a test gives the solution a {type(value).__name__}; only plain values can be given")


def make_error(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its like take more
        return RuntimeError(text)


def change(given: Any, now: Any) -> None:
    if type(given) is not type(now) or given is now:
        return
    if isinstance(given, list):
        given[:] = now
    elif isinstance(given, set | dict):
        given.clear()
        given.update(now)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
