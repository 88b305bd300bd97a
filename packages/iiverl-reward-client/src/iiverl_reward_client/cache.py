"""Scores on disk, so that the same output is not scored twice by the same version of a server."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.protocol import finite_number, parsed
from iiverl_reward_client.sample import RewardSample

_log = logging.getLogger(__name__)


class ScoreCache:
    """Scores by what was scored and by the server's version, a file each; failures are never kept.

    Several processes may share a folder. A file that cannot be read counts as absent, and a score that cannot be
    written is told once in the log: neither costs a score.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).expanduser()
        self._told = False

    def get(self, protocol: str, version: str, sample: RewardSample) -> Scored | None:
        """Look a score up."""
        file = self._file(protocol, version, sample)
        try:
            answer = None if file is None else parsed(file.read_bytes())
        except OSError:
            return None
        score = finite_number(answer.get("score")) if isinstance(answer, dict) else None
        if score is None:
            return None
        components, info = answer.get("components"), answer.get("info")
        return Scored(
            score,
            components if isinstance(components, dict) else {},
            info if isinstance(info, dict) else {},
        )

    def put(self, protocol: str, version: str, sample: RewardSample, scored: Scored) -> None:
        """Keep a score."""
        file = self._file(protocol, version, sample)
        if file is None:
            return
        content = {"score": scored.score, "components": dict(scored.components), "info": dict(scored.info)}
        try:
            _write(file, json.dumps(content))
        except OSError as error:
            if not self._told:
                _log.warning("scores cannot be kept in %s: %s", self._folder, error)
                self._told = True

    def _file(self, protocol: str, version: str, sample: RewardSample) -> Path | None:
        """Name the file of a sample; None if it holds something that has no name in JSON, such as a label that the
        protocol does not send."""
        try:
            info, label = (
                dict(value) if isinstance(value, Mapping) else value
                for value in (sample.verification_info, sample.label)
            )
            parts = [protocol, version, sample.llm_output, sample.prompt, sample.response, info, label]
            text = json.dumps(parts, sort_keys=True)
        except Exception:  # whatever a caller's objects raise
            return None
        name = hashlib.sha256(text.encode()).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.json"


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
