"""The end of a save: what the processes have written is counted when all have."""

from pathlib import Path
from typing import Any

import pytest
import test_controller_state

from iiverl_core.checkpoints import files_in
from iiverl_core.cluster.messages import WorkerInfo
from iiverl_core.config.roles import ROLE_KEYS
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.training import ParallelRank


class Worker:
    """Ends a save by giving its file the name that it keeps."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._writing, self._final = folder / f"writing-{rank}", folder / f"rank-{rank}"
        self._writing.write_bytes(bytes(rank + 1))

    def finish_save(self) -> None:
        self._writing.rename(self._final)

    def saved_files(self, folder: Path) -> dict[str, int]:
        return files_in(folder)


class Group:
    """Three ranks, which are called in this order."""

    def __init__(self, folder: Path, order: list[int]) -> None:
        self._workers, self._order = [Worker(folder, rank) for rank in range(3)], order
        self.infos = [
            WorkerInfo(
                rank=rank,
                host="host",
                pid=rank,
                device="cpu",
                parallel_ranks=dict.fromkeys(ROLE_KEYS, ParallelRank(rank, 3)),
                parameters={"actor": 0},
                trained_parameters={},
                layouts=dict.fromkeys(ROLE_KEYS, "packed"),
            )
            for rank in range(3)
        ]

    def run(self, method: Any, arguments: list[Any]) -> list[Any]:
        results = {
            rank: getattr(self._workers[rank], method.__name__)(*arguments[rank]) for rank in self._order
        }
        return [results[rank] for rank in range(3)]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_no_file_is_counted_under_a_passing_name(order: list[int], tmp_path: Path) -> None:
    group: Any = Group(tmp_path, order)
    engines: Any = None
    workers = WorkerClient(group, engines, test_controller_state.RUN)
    assert workers.finish_save(tmp_path) == {"rank-0": 1, "rank-1": 2, "rank-2": 3}
