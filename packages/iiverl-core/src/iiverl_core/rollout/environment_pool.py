"""Environments of the user's in processes of their own."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from iiverl_core import activity
from iiverl_core.config.sections.multi_turn import EnvironmentConfig
from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.environment_process import Answered, Call, Setup
from iiverl_core.rollout.process_pool import EnvironmentFailure, ProcessPool, ask
from iiverl_core.user_process import Reply, UserProcess


class EnvironmentPool(ProcessPool):
    """Starts a process for each environment that is open at a time, and uses it again when that is closed."""

    def __init__(self, config: EnvironmentConfig, output: Path) -> None:
        self.config = config
        setup = Setup(list(sys.path), config.path, config.name, config.kwargs)
        module = "iiverl_core.environment_process"
        super().__init__(module, setup, config.path or config.name, config.turn_timeout, output)

    def open(self, seed: str) -> "OpenEnvironment":
        """Open an environment whose random numbers depend on `seed`; its process is started by the first call."""
        self.start()
        return OpenEnvironment(self, seed)


class OpenEnvironment:
    """One environment: `reset` once, then `step` after `step`; `close` in any case.

    Calls raise `EnvironmentFailure`, after which only `close` may follow.
    """

    def __init__(self, pool: EnvironmentPool, seed: str) -> None:
        self._pool, self._seed = pool, seed
        self._process: UserProcess | None = None
        self._calls = 0
        self._left_s = pool.config.rollout_timeout
        self._idle = True

    async def reset(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Make the environment, and return the first messages; None for the row's prompt."""
        return await self._pool.run(self._reset(row))

    async def step(self, message: Mapping[str, Any]) -> Answered:
        """Return the answer to a message."""
        return await self._pool.run(self._call("step", message))

    def close(self) -> None:
        """Let the environment close itself, without waiting for it; its process ends if a call is still running."""
        self._pool.keep(self._close())

    async def _reset(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        while True:
            process = self._process = await self._pool.take()
            used = process.last_id > 0
            try:
                return await self._call("reset", row)
            except EnvironmentFailure:
                if not (used and process.how):
                    raise
                self._calls = 0  # what an earlier environment left behind may have ended it

    async def _call(self, method: Literal["reset", "step", "close"], argument: Any = None) -> Any:
        process = self._process
        assert process is not None
        process.last_id += 1
        config = self._pool.config
        call = Call(process.last_id, f"{self._seed}/call {self._calls}", method, argument)
        self._calls += 1
        limit = min(config.turn_timeout, self._left_s)
        key = "turn_timeout" if limit == config.turn_timeout else "rollout_timeout"
        began = time.monotonic()
        self._idle = False
        what = f"{config.name}.{method}"
        reply: Reply = await ask(
            process, call.id, call, limit, what, f" ({ROLLOUT}.multi_turn.environment.{key})"
        )
        self._idle = True
        self._left_s -= time.monotonic() - began
        activity.advance()
        if reply.problem:
            raise EnvironmentFailure(reply.problem)
        return reply.value

    async def _close(self) -> None:
        if self._process is None:
            return
        self._left_s = self._pool.config.turn_timeout
        if self._idle:
            with suppress(EnvironmentFailure):
                await self._call("close")
        if self._idle:
            self._pool.put_back(self._process)
        else:
            self._process.kill("timeout")
