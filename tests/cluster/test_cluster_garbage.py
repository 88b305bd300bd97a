"""Modules are kept from the garbage collector; what a run leaves behind is not."""

import gc
import sys
import weakref
from pathlib import Path

import pytest

from iiverl_core.garbage import importing


class Cycle:
    """An object that refers to itself, so only the collector ends it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_a_run_left_behind_is_collected_after_the_next_began() -> None:
    left = weakref.ref(Cycle())
    with importing():
        pass
    gc.collect()
    assert left() is None


def test_imports_are_not_interrupted_and_an_error_restores_the_collector() -> None:
    before = gc.get_threshold()
    with pytest.raises(ImportError), importing():
        assert gc.get_threshold()[0] > before[0]
        raise ImportError
    assert gc.get_threshold() == before


def test_what_was_imported_is_not_visited_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_once.py").write_text("things = [[] for _ in range(1000)]")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    thresholds = gc.get_threshold()
    with importing():
        import imported_once  # type: ignore[import-not-found]
    try:
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold() == thresholds
        assert not any(each is imported_once.things for each in gc.get_objects())
    finally:
        del sys.modules["imported_once"]
        gc.unfreeze()
