"""Traces of a worker's steps, with torch's profiler."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from iiverl_core.config import ProfileConfig


class StepProfiler:
    """Records everything that this process does between `begin` and `end`, as a trace for Perfetto.

    Spans name what a worker is called for, so that operations can be found by their purpose.
    """

    def __init__(self, config: ProfileConfig | None, rank: int) -> None:
        self._config, self._rank = config, rank
        self._running: tuple[profile, Path] | None = None

    def begin(self, step: int) -> None:
        """Start to record, if this process is one of those to profile."""
        config = self._config
        if config is None or not (config.ranks is None or self._rank in config.ranks):
            return
        path = config.folder / f"step_{step}.rank_{self._rank}.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        activities = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}
        running = profile(
            activities=[
                activity
                for name, activity in activities.items()
                if name in config.contents and (name == "cpu" or torch.cuda.is_available())
            ],
            profile_memory="memory" in config.contents,
            record_shapes="shapes" in config.contents,
            with_stack="stack" in config.contents,
        )
        running.start()
        self._running = running, path

    def end(self) -> Path | None:
        """Stop, and write the trace; return its file, or None if this process is not profiled."""
        if self._running is None:
            return None
        (running, path), self._running = self._running, None
        running.stop()
        running.export_chrome_trace(str(path))
        return path

    def span(self, name: str) -> AbstractContextManager[object]:
        """Name what happens within it; without effect between traces."""
        return record_function(name) if self._running else nullcontext()
