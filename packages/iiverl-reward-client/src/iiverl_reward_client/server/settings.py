"""The server's settings, from the environment or a `.env` file; the environment takes precedence."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

_UNPREFIXED = ("use_format_verifier", "fusion_sandbox_url", "llm_judge_")

_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
_QUOTED = re.compile(r"""(?:"((?:[^"\\]|\\.)*)"|'([^']*)')\s*(?:#.*)?$""")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


class SettingsError(Exception):
    """A setting, or a file that it names, is invalid."""


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return name.upper() if name.startswith(_UNPREFIXED) else f"REWARD_SERVER_{name.upper()}"


class Settings(BaseModel):
    """Settings with defaults; `variable_of` returns the environment variable of each."""

    model_config = ConfigDict(frozen=True, alias_generator=variable_of, populate_by_name=True, extra="ignore")

    use_format_verifier: bool = Field(default=False, description="Score 0.9 × answer + 0.1 × format.")
    fusion_sandbox_url: str | None = Field(default=None, description="Address of a Sandbox Fusion server.")
    llm_judge_model: str | None = Field(default=None, description="Model of the judge.")
    llm_judge_base_url: str | None = Field(
        default=None, description="Address of the judge's OpenAI-compatible server, ending in /v1."
    )
    llm_judge_api_key: SecretStr | None = Field(
        default=None, description="API key of the judge, if it needs one."
    )
    llm_judge_max_tokens: int = Field(default=1024, gt=0, description="Maximum tokens of a judgement.")
    llm_judge_temperature: float = Field(default=0.0, ge=0, description="Sampling temperature of the judge.")

    # Not host and port: Kubernetes sets REWARD_SERVER_PORT, which holds an address, next to a service reward-server.
    bind_host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 for all interfaces."
    )
    bind_port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 for any free port."
    )
    token: SecretStr | None = Field(default=None, description="Bearer token that requests must carry.")
    answer_marker: str = Field(
        default="<｜Assistant｜>", min_length=1, description="Text before the response in `llm_output`."
    )
    end_token: str = Field(
        default="<｜end▁of▁sentence｜>",
        min_length=1,
        description="Token that ends a turn, for the format score.",
    )
    max_body_bytes: int = Field(default=32 * 2**20, gt=0, description="Maximum bytes of a request.")
    max_bodies_bytes: int = Field(
        default=512 * 2**20,
        gt=0,
        description="Maximum bytes of all requests at a time; more are answered with 503.",
    )
    max_batch: int = Field(default=256, gt=0, description="Maximum samples of a request.")
    queue: int = Field(
        default=1024, ge=0, description="Maximum waiting samples per type; more are answered with 503."
    )
    workers: int = Field(
        default=min(4, os.cpu_count() or 1),
        gt=0,
        description="Processes per type.",
    )
    sandbox_places: int = Field(
        default=min(4, os.cpu_count() or 1), gt=0, description="Programs that run at the same time."
    )
    time_limit: float = Field(default=10.0, gt=0, description="Maximum seconds of a verifier's function.")
    response_time_limit: float = Field(
        default=5.0, gt=0, description="CPU seconds after which a response to mathematics or edits scores 0."
    )
    accept_unevaluated: bool = Field(
        default=False,
        description="Accept answers to mathematics with operators that the reference does not have.",
    )
    memory_bytes: int = Field(
        default=2 * 2**30, gt=0, description="Maximum resident bytes of a verifier's process."
    )
    case_time_limit: float = Field(
        default=5.0,
        gt=0,
        description="CPU seconds of a program per test case, and a third of its seconds; seconds with Sandbox Fusion.",
    )
    code_time_limit: float = Field(
        default=20.0, gt=0, description="Maximum seconds of a program for all its test cases."
    )
    judge_time_limit: float = Field(default=20.0, gt=0, description="Maximum seconds of a judgement.")
    judge_places: int = Field(default=32, gt=0, description="Judgements at the same time.")


def load_settings(env_file: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from `environ` (by default the process's) and from a `.env` file.

    `env_file` must exist; by default it is `.env` in the working directory, if that exists. An empty value counts as
    unset.

    Raises:
        SettingsError: the file cannot be read, or a setting is invalid; the message does not hold its value.
    """
    path = Path(".env") if env_file is None else Path(env_file)
    values: dict[str, str] = {}
    if env_file is not None or path.is_file():
        values.update(_read(path))
    values.update(
        {key: value for key, value in (os.environ if environ is None else environ).items() if value}
    )
    try:
        return Settings.model_validate({key: value for key, value in values.items() if value}, by_name=False)
    except ValidationError as error:
        # Values are omitted, since one of them may be a secret.
        problems = "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
        raise SettingsError(f"settings of the reward server: {problems}") from None


def _read(path: Path) -> dict[str, str]:
    """Read `NAME=value` lines. Values may be quoted, in double quotes with \\n and \\t; `#` starts a comment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SettingsError(f"{path}, line {number}: expected NAME=value")
        values[match[1]] = _unquoted(match[2])
    return values


def _unquoted(written: str) -> str:
    quoted = _QUOTED.match(written)
    if quoted is None:
        return re.split(r"(?:^|\s)#", written, maxsplit=1)[0].strip()
    if quoted[2] is not None:
        return quoted[2]
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), quoted[1])
