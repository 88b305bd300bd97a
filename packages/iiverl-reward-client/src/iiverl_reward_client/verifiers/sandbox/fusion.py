"""Sandbox Fusion, ByteDance's open-source server that runs code in many languages: `POST /run_code`."""

import math
from typing import Any, Literal

import httpx

from iiverl_reward_client.verifiers import bounded_http
from iiverl_reward_client.verifiers.sandbox.base import (
    DEFAULT_LIMITS,
    Execution,
    Limits,
    SandboxError,
    UnsupportedLanguage,
)

_ESCAPED = 6  # bytes of a character in JSON, at most
_SPARE_BYTES = 1 << 20
_SLACK_SECONDS = 30.0  # for a busy server, in addition to compiling and running


class FusionSandbox:
    """Runs programs on a Sandbox Fusion server; `url` is its root, or ends in `/run_code`.

    It enforces limits on wall time and memory; the others are the server's own. CPU time is not limited separately, so the
    smaller of the two limits is one of wall time.
    """

    def __init__(self, url: str) -> None:
        root = url.rstrip("/").removesuffix("/run_code")
        self._address = f"{root}/run_code"
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(limits=limits, trust_env=bounded_http.uses_proxy(root))

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        """Run a program in any language that the server supports; see `Sandbox.run`."""
        seconds = min(limits.cpu_seconds, limits.wall_seconds)
        request = {
            "code": source,
            "stdin": stdin,
            "language": language,
            "compile_timeout": seconds,
            "run_timeout": seconds,
            "memory_limit_MB": math.ceil(limits.memory_bytes / (1 << 20)),
        }
        try:
            response = bounded_http.post_sync(
                self._client,
                self._address,
                request,
                _ESCAPED * limits.output_bytes + _SPARE_BYTES,
                timeout=2 * seconds + _SLACK_SECONDS,
            )
        except bounded_http.OversizedError as error:
            raise SandboxError(f"{self._address}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SandboxError(f"{self._address}: {type(error).__name__}: {error}") from error
        if response.status_code == 422:  # only the language can be invalid
            raise UnsupportedLanguage(f"{self._address} refuses {language!r}: {response.text[:300]}")
        if response.status_code != 200:
            raise SandboxError(f"{self._address} answers {response.status_code}: {response.text[:300]}")
        try:
            return _execution(response.json(), limits.output_bytes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SandboxError(
                f"{self._address} returned no result of a run: {response.text[:300]}"
            ) from error


def _execution(answer: dict[str, Any], output_bytes: int) -> Execution:
    """Parse a response; a program that does not compile has the compiler's streams and exit code.

    Raises:
        SandboxError: the server reports a failure of its own.
        KeyError, TypeError, ValueError: it is not a response of `/run_code`.
    """
    if answer["status"] == "SandboxError":
        raise SandboxError(f"Sandbox Fusion failed: {str(answer.get('message'))[:300]}")
    result = answer.get("run_result") or answer["compile_result"]
    stdout, stderr = (result.get(name) or "" for name in ("stdout", "stderr"))
    code = result.get("return_code")
    ended = _ended(result["status"], code)
    if len(stdout) + len(stderr) > output_bytes:
        return Execution(stdout[:output_bytes], stderr[:output_bytes], None, "output")
    return Execution(stdout, stderr, code if ended == "exit" else None, ended)


def _ended(status: str, code: int | None) -> Literal["exit", "signal", "timeout"]:
    if status == "TimeLimitExceeded":
        return "timeout"
    if status != "Finished":
        raise ValueError(f"unknown status {status!r}")
    return "signal" if code is None or code < 0 else "exit"
