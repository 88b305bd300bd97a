"""Calls of the user's tools in processes, each of which runs one call at a time."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iiverl_core import activity
from iiverl_core.config.sections.multi_turn import ToolsConfig
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.process_pool import CallTimeout, EnvironmentFailure, ProcessPool, ask
from iiverl_core.tool_process import Call, Result, Setup
from iiverl_core.user_process import Reply


class ToolPool(ProcessPool):
    """Calls functions in at most `workers` processes; further calls wait for one."""

    def __init__(self, config: ToolsConfig, output: Path) -> None:
        setup = Setup(list(sys.path), config.path, config.names or (), config.mcp_servers)
        loads = config.path or f"the servers {', '.join(config.mcp_servers)}"
        super().__init__("iiverl_core.tool_process", setup, loads, config.timeout, output)
        self._config = config
        self._free = asyncio.Semaphore(config.workers)

    def schemas(self) -> list[dict[str, Any]]:
        """Load the user's file, and return the descriptions of the functions for the model.

        Raises:
            ConfigError: the file or a function cannot be loaded or described.
        """
        if self.loaded is None:
            try:
                asyncio.run_coroutine_threadsafe(self._load(), self.start()).result()
            except (ConfigError, EnvironmentFailure) as error:
                self.close()
                raise ConfigError(str(error)) from error
        return list(self.loaded or ())

    async def call(self, name: str, arguments: Mapping[str, Any], seed: str) -> Result:
        """Call a function; a call that takes too long is an error that the model sees.

        Raises:
            EnvironmentFailure: the process of the call ended.
        """
        self.start()
        return await self.run(self._call(name, arguments, seed))

    async def _load(self) -> None:
        self.put_back(await self.take())

    async def _call(self, name: str, arguments: Mapping[str, Any], seed: str) -> Result:
        async with self._free:
            process = await self.take()
            process.last_id += 1
            call = Call(process.last_id, seed, name, arguments)
            try:
                reply: Reply = await ask(process, call.id, call, self._config.timeout, name)
            except CallTimeout as timeout:
                return Result(f"Error: {timeout}", is_error=True)
            except asyncio.CancelledError:  # the run ends; the process may be in the middle of the call
                process.kill("timeout")
                raise
            finally:
                activity.advance()
            self.put_back(process)
            return reply.value
