"""Cache scores on disk, so that the same version of a server does not score the same output twice."""

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
    """Scores by sample and server version, one file each; failures are never cached.

    Several processes may share a folder. A file that cannot be read counts as absent; if a score cannot be written, a
    warning is logged once.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).expanduser()
        self._warned = False

    def get(self, protocol: str, version: str, sample: RewardSample) -> Scored | None:
        """Look up a score."""
        file = self._file(protocol, version, sample)
        try:
            answer = None if file is None else parsed(file.read_bytes())
        except OSError:
            return None
        if not isinstance(answer, dict):
            return None
        score = finite_number(answer.get("score"))
        if score is None:
            return None
        components, info = answer.get("components"), answer.get("info")
        return Scored(
            score,
            components if isinstance(components, dict) else {},
            info if isinstance(info, dict) else {},
        )

    def put(self, protocol: str, version: str, sample: RewardSample, scored: Scored) -> None:
        """Store a score."""
        file = self._file(protocol, version, sample)
        if file is None:
            return
        content = {"score": scored.score, "components": dict(scored.components), "info": dict(scored.info)}
        try:
            _write(file, json.dumps(content))
        except OSError as error:
            if not self._warned:
                _log.warning("scores cannot be cached in %s: %s", self._folder, error)
                self._warned = True

    def _file(self, protocol: str, version: str, sample: RewardSample) -> Path | None:
        """Return the path of a sample's file; None if JSON cannot represent it, such as a label that is not sent."""
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
    """Write a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
