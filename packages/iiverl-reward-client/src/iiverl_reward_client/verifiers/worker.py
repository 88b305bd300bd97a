"""A process that runs one verifier's function, a submission at a time, until its input ends.

`python -m iiverl_reward_client.verifiers.worker TARGET SECONDS`, where TARGET is `module:function` or
`file.py:function`. It says `{"ready": true}` once the function is loaded, or `{"unusable": why}`; then a line of JSON in
is answered by a line of JSON out. A process, since nothing else can be stopped in the midst of a computation.
"""

import asyncio
import importlib
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import reduce
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from iiverl_reward_client.verifiers.returned import NoScoreError, parts_of
from iiverl_reward_client.verifiers.verifier import Submission, VerifierError

_GRACE = 2.0  # seconds beyond the time limit that the server has to end this process itself


def main(target: str, time_limit: float) -> None:
    """Serve submissions until the input ends; the server kills this process when one takes too long."""
    # Standard streams are the verifier's: what it prints must not end up among the replies.
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
        _send(replies, {"unusable": told(error)})
        return
    _send(replies, {"ready": True})
    for line in requests:
        # Should the server be gone, nobody kills this process: the system's alarm does.
        signal.setitimer(signal.ITIMER_REAL, time_limit + _GRACE)
        reply = run(function, Submission(**json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


class SignatureError(TypeError):
    """A verifier that cannot be called with one `Submission`, or whose result cannot be a score."""


def load(target: str) -> Callable[[Submission], Any]:
    """Import the function that a target names.

    Raises:
        ImportError, AttributeError: there is no such module, file or function.
        SignatureError: it is not a function of one `Submission` that returns a score.
    """
    place, _, name = target.rpartition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = reduce(getattr, name.split("."), module)
    _check_signature(function, name)
    return function


def _check_signature(function: Any, name: str) -> None:
    """See that a function takes one positional argument and returns a value, or a coroutine of one."""
    wanted = f"a verifier is a function of one argument: def {name}(submission: Submission) -> float | dict"
    if not callable(function) or isinstance(function, type):
        what = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise SignatureError(f"{name} is {what}; {wanted}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise SignatureError(f"{name} yields instead of returning a score; {wanted}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, and says nothing of its arguments
        return
    try:
        signature.bind(None)
    except TypeError:
        raise SignatureError(f"{name} has the signature {name}{signature}; {wanted}") from None


def run(function: Callable[[Submission], Any], submission: Submission) -> dict[str, Any]:
    """Score a submission; gives the reply, in which an error of the function is a failure."""
    try:
        returned = function(submission)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
        return parts_of(returned)
    except VerifierError as failed:
        return {"failed": failed.kind, "detail": failed.detail, "retry_after": failed.retry_after}
    except NoScoreError as error:
        return {"raised": str(error)}
    except (Exception, SystemExit) as error:
        return {"raised": told(error)}


def told(error: BaseException) -> str:
    """Tell an error by its message and the place where it was raised."""
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
    main(sys.argv[1], float(sys.argv[2]))
