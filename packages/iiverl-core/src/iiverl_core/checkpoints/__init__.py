"""Checkpoints of a run on disk: written whole or not at all, verified before use, compared with the run that resumes."""

from iiverl_core.checkpoints.storage import (
    CONFIG_FILE,
    DATASET_FILE,
    STATE_FILE,
    VERSIONS_FILE,
    Checkpoint,
    Latest,
    PassedOver,
    check_space,
    check_writable,
    clean,
    files_in,
    latest,
    read_json,
    verify,
    write,
    write_json,
)

__all__ = [
    "CONFIG_FILE",
    "DATASET_FILE",
    "STATE_FILE",
    "VERSIONS_FILE",
    "Checkpoint",
    "Latest",
    "PassedOver",
    "check_space",
    "check_writable",
    "clean",
    "files_in",
    "latest",
    "read_json",
    "verify",
    "write",
    "write_json",
]
