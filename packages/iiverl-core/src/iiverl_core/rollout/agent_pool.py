"""Agents of the user's in processes of their own."""

import asyncio
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iiverl_core import activity
from iiverl_core.agent_process import Call, Ended, Setup
from iiverl_core.config.sections.multi_turn import ProgramConfig
from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.rollout.process_pool import EnvironmentFailure, ProcessPool, ask
from iiverl_core.user_process import Reply


class AgentPool(ProcessPool):
    """Starts a process for each agent that runs at a time, and uses it again for others."""

    def __init__(self, config: ProgramConfig, output: Path) -> None:
        self._config = config
        command = shlex.split(config.command or "")
        self._folder = TemporaryDirectory(prefix="iiverl-agents-", ignore_cleanup_errors=True)
        setup = Setup(list(sys.path), config.path, config.name, command, self._folder.name)
        super().__init__("iiverl_core.agent_process", setup, config.path or "", config.timeout, output)
        self._what = config.name if config.path else command[0]

    async def call(self, base_url: str, api_key: str, row: Mapping[str, Any], seed: str) -> Ended:
        """Run an agent to its end; if the caller is cancelled, its process ends.

        Raises:
            EnvironmentFailure: it raised, took too long, ended its process, or returned garbage.
        """
        self.start()
        return await self.run(self._call(base_url, api_key, row, seed))

    def close(self) -> None:
        """End all processes. May be called twice."""
        super().close()
        self._folder.cleanup()

    async def _call(self, base_url: str, api_key: str, row: Mapping[str, Any], seed: str) -> Ended:
        process = await self.take()
        process.last_id += 1
        call = Call(process.last_id, seed, base_url, api_key, row)
        limit = f" ({ROLLOUT}.multi_turn.agent.timeout)"
        try:
            reply: Reply = await ask(process, call.id, call, self._config.timeout, self._what, limit)
        except asyncio.CancelledError:  # the agent may be in the middle of something
            process.kill("timeout")
            raise
        activity.advance()
        self.put_back(process)
        if reply.problem:
            raise EnvironmentFailure(reply.problem)
        return reply.value
