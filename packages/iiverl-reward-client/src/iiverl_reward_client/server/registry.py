"""Find the verifiers of a server: built-in ones, and those of installed packages and files."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from iiverl_reward_client.server.settings import Settings, SettingsError, variable_of
from iiverl_reward_client.verifiers import Verifier
from iiverl_reward_client.verifiers.answers import check_math, check_swe
from iiverl_reward_client.verifiers.code_verifiable import CodeVerifier
from iiverl_reward_client.verifiers.functions import FunctionVerifier
from iiverl_reward_client.verifiers.llm_judge import JudgeVerifier
from iiverl_reward_client.verifiers.processes import WorkerLimits

GROUP = "iiverl.verifiers"
BUILT_IN = ("math_verifiable", "code_verifiable", "swe_verifiable", "llm_judge")

_SECRETS = ("llm_judge_api_key", "token")
_SCORING = (
    "use_format_verifier", "answer_marker", "end_token", "llm_judge_model", "llm_judge_base_url",
    "llm_judge_max_tokens", "llm_judge_temperature", "fusion_sandbox_url", "case_time_limit", "code_time_limit",
    "response_time_limit", "accept_unevaluated", "memory_bytes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RegisteredVerifier:
    """A verifier and its concurrency limit."""

    verifier: Verifier
    places: int


def find_verifiers(settings: Settings, files: Sequence[str] = ()) -> dict[str, RegisteredVerifier]:
    """Return the verifiers by type. `files` are user verifiers as `file.py:function`; the function's name is the type.

    Installed packages register verifiers in the entry point group `iiverl.verifiers`, under the name of their type.

    Raises:
        SettingsError: there is no such file, or two verifiers have the same type.
    """
    verifiers = _built_in(settings)
    installed = [(each.name, each.value.split(" ")[0]) for each in entry_points(group=GROUP)]
    for type, target in (*installed, *_of_files(files)):
        if type in verifiers:
            raise SettingsError(f"verifier {target}: there is a verifier of the type {type!r} already")
        verifiers[type] = RegisteredVerifier(_function(settings, target), settings.workers)
    return verifiers


def version_of(settings: Settings, files: Sequence[str] = ()) -> str:
    """Return the package's version with a digest of the settings and files that affect scores."""
    digest = hashlib.sha256()
    for name in _SCORING:
        digest.update(f"{name}={getattr(settings, name)!r}\n".encode())
    for each in entry_points(group=GROUP):
        digest.update(f"{each.name}={each.value} {each.dist.version if each.dist else None}\n".encode())
    for type, target in _of_files(files):
        digest.update(f"{type}=".encode() + Path(target.rpartition(":")[0]).read_bytes())
    digest.update(version("math-verify").encode())
    return f"{version('iiverl-reward-client')}+{digest.hexdigest()[:12]}"


def _built_in(settings: Settings) -> dict[str, RegisteredVerifier]:
    here = "iiverl_reward_client.verifiers"
    key = settings.llm_judge_api_key
    code = CodeVerifier(
        settings.fusion_sandbox_url,
        places=settings.sandbox_places,
        case_seconds=settings.case_time_limit,
        seconds=settings.code_time_limit,
    )
    judge = JudgeVerifier(
        settings.llm_judge_model,
        settings.llm_judge_base_url,
        key.get_secret_value() if key else None,
        max_tokens=settings.llm_judge_max_tokens,
        temperature=settings.llm_judge_temperature,
        seconds=settings.judge_time_limit,
    )
    form = "score_unevaluated" if settings.accept_unevaluated else "score"
    mathematics = _function(settings, f"{here}.math_verifiable:{form}", check_math)
    edits = _function(settings, f"{here}.swe_verifiable:score", check_swe)
    return {
        "math_verifiable": RegisteredVerifier(mathematics, settings.workers),
        "code_verifiable": RegisteredVerifier(code, settings.sandbox_places),
        "swe_verifiable": RegisteredVerifier(edits, settings.workers),
        "llm_judge": RegisteredVerifier(judge, settings.judge_places),
    }


def _function(
    settings: Settings, target: str, check: Callable[[Any], None] | None = None
) -> FunctionVerifier:
    return FunctionVerifier(
        target,
        places=settings.workers,
        limits=WorkerLimits(settings.time_limit, settings.response_time_limit, settings.memory_bytes),
        check=check,
        hidden_variables=[variable_of(name) for name in _SECRETS],
    )


def _of_files(files: Sequence[str]) -> list[tuple[str, str]]:
    """Parse the verifiers of files as (type, target)."""
    found: list[tuple[str, str]] = []
    for written in files:
        place, _, name = written.rpartition(":")
        path = Path(place).expanduser().resolve()
        if path.suffix != ".py" or not name:
            raise SettingsError(f"verifier {written}: expected file.py:function")
        if not path.is_file():
            raise SettingsError(f"verifier {written}: {path} does not exist or is not a file")
        found.append((name, f"{path}:{name}"))
    return found
