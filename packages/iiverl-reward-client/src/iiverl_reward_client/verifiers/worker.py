"""A process that runs one verifier function, one submission at a time, until its input ends.

`python -m iiverl_reward_client.verifiers.worker TARGET SECONDS RESPONSE_SECONDS BYTES`, where TARGET is `module:function` or
`file.py:function`. It writes `{"ready": true}` once the function is loaded, or `{"unusable": why}`; then it answers each
line of JSON with a line of JSON. A function in two stages (`ReferenceFirst`) is preceded by the line
`{"stage": "response"}` once the reference has been read; from then on the response may use
RESPONSE_SECONDS of CPU time and BYTES of further address space. It is a process because only a process can be stopped during a
computation.
"""

import asyncio
import importlib
import inspect
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from importlib.util import module_from_spec, spec_from_file_location
from numbers import Real
from pathlib import Path
from typing import Any

from iiverl_reward_client.verifiers.verifier import ReferenceFirst, ResponseError, Submission, VerifierError

_GRACE = 2.0  # seconds after the time limit for the server to kill this process


def main(target: str, time_limit: float, response_seconds: float, memory_bytes: int) -> None:
    """Serve submissions until the input ends; the server kills this process if one takes too long."""
    # The verifier gets the standard streams: what it prints must not get among the replies.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        function = load(target)
    except SignatureError as error:
        _send(replies, {"unusable": str(error)})
        return
    except (Exception, SystemExit) as error:
        _send(replies, {"unusable": describe_error(error)})
        return
    _send(replies, {"ready": True})
    for line in requests:
        # If the server is gone, the alarm ends this process.
        signal.setitimer(signal.ITIMER_REAL, time_limit + _GRACE)
        reply = run(
            function,
            Submission(**json.loads(line)),
            lambda: _response_stage(replies, response_seconds, memory_bytes),
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


class SignatureError(TypeError):
    """A verifier cannot be called with one `Submission`, or cannot return a score."""


class NoScoreError(ValueError):
    """A function's return value is not a score."""


def load(target: str) -> Callable[[Submission], Any]:
    """Import the function that a target names.

    Raises:
        ImportError, AttributeError: there is no such module, file or function.
        SignatureError: it is not a function of one `Submission` that returns a score.
    """
    place, _, name = target.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function: Any = reduce(getattr, name.split("."), module)
    _check_signature(function, name)
    return function


def _check_signature(function: Any, name: str) -> None:
    """Check that a function takes one positional argument and returns a value or a coroutine."""
    wanted = (
        f"a verifier must be a function of one argument: def {name}(submission: Submission) -> float | dict"
    )
    if not callable(function) or isinstance(function, type):
        what = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise SignatureError(f"{name} is {what}; {wanted}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise SignatureError(f"{name} yields instead of returning a score; {wanted}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return
    try:
        signature.bind(None)
    except TypeError:
        raise SignatureError(f"{name} has the signature {name}{signature}; {wanted}") from None


def run(
    function: Callable[[Submission], Any],
    submission: Submission,
    response_stage: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Score a submission and return the reply.

    An exception of the function becomes a failure; one of the second stage of `ReferenceFirst`, which runs in the
    context `response_stage`, a score of 0.
    """
    try:
        if isinstance(function, ReferenceFirst):
            reference = function.read(submission.answer)
            try:
                with response_stage():
                    return parts_of(function.compare(submission.response, reference))
            except Exception as error:
                raise ResponseError(describe_error(error)) from error
        returned = function(submission)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
        return parts_of(returned)
    except ResponseError as error:
        return {"unearned": error.reason}
    except VerifierError as failed:
        return {"failed": failed.kind, "detail": failed.detail, "retry_after": failed.retry_after}
    except NoScoreError as error:
        return {"raised": str(error)}
    except (Exception, SystemExit) as error:
        return {"raised": describe_error(error)}


@contextmanager
def _response_stage(replies: Any, cpu_seconds: float, memory_bytes: int) -> Iterator[None]:
    """Announce that the reference has been read, and limit what the response may use.

    The kernel ends the process with SIGPROF once the CPU time is used up. That is the response's doing; if the time limit
    ends before, it is the machine's, which is too busy.
    """
    _send(replies, {"stage": "response"})
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if used := _address_space():
        most = used + memory_bytes
        resource.setrlimit(
            resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
        )
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Return the bytes of this process's address space; 0 without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def parts_of(returned: Any) -> dict[str, Any]:
    """Return `score`, `components` and `info` of a function's return value.

    A finite number or a bool is the score. So is `score` of a mapping, whose other finite numbers become
    `components` and the rest `info`.

    Raises:
        NoScoreError: it is neither.
    """
    if not isinstance(returned, Mapping):
        return {"score": _score(returned, "returned"), "components": {}, "info": {}}
    if "score" not in returned:
        raise NoScoreError(
            f"returned a dict without 'score'; its keys: {', '.join(map(str, returned)) or 'none'}"
        )
    components: dict[str, float] = {}
    info: dict[str, Any] = {}
    for key, value in returned.items():
        number = _number(value)
        if number is None:
            info[str(key)] = _carried(value)
        elif key != "score":
            components[str(key)] = number
    return {
        "score": _score(returned["score"], "returned a dict whose 'score' is"),
        "components": components,
        "info": info,
    }


def _score(value: Any, prefix: str) -> float:
    number = _number(value)
    if number is None:
        raise NoScoreError(
            f"{prefix} {repr(value)[:80]} of type {type(value).__name__}, which is not a finite number"
        )
    return number


def _number(value: Any) -> float | None:
    """Convert a number, including numpy's and one-element tensors, to a finite float; None for anything else."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # an array of several elements
            return None
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _carried(value: Any) -> Any:
    """Return a value as it is if JSON can represent it, else as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
    return value


def describe_error(error: BaseException) -> str:
    """Describe an error by its message and where it was raised."""
    message = "".join(traceback.format_exception_only(error)).strip()[-500:]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{message} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else message


async def _awaited(returned: Any) -> Any:
    return await returned


def _from_file(path: Path) -> Any:
    spec = spec_from_file_location(f"iiverl_verifier_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"{path} is not a Python file that can be read")
    sys.path.insert(0, str(path.parent))  # as for a script, so that it finds its neighbours
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _send(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
