"""Checkpoints in tests need not survive a power cut, and waiting for the disk is most of the time that they take."""

import os

import pytest


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave `os.fsync` out."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
