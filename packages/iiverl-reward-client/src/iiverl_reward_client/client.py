"""The asynchronous client: score samples on one or several reward servers."""

import asyncio
import os
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, get_args

import httpx

from iiverl_reward_client.addresses import read_addresses
from iiverl_reward_client.asyncio_transport import AsyncioTransport
from iiverl_reward_client.cache import ScoreCache
from iiverl_reward_client.dialects import Capabilities, ProtocolName
from iiverl_reward_client.dispatcher import Dispatcher, DispatchOptions
from iiverl_reward_client.endpoint import Breaker, Endpoint
from iiverl_reward_client.exchange import Sender
from iiverl_reward_client.outcomes import Failed, Outcome
from iiverl_reward_client.probing import DIALECTS, ask_capabilities, ping
from iiverl_reward_client.retrying import Retries, Timeouts
from iiverl_reward_client.sample import RewardSample, checked
from iiverl_reward_client.streaming import stream


class RewardClient:
    """Scores samples on reward servers. Each sample gets a `Scored` or a `Failed`; scoring never raises for a sample.

    Args:
        urls: One server, or several equivalent ones; each request goes to the one with the fewest in flight. For
            `openrlhf` and `slime` it is the full URL, for the other protocols paths are appended.
        token: Sent as `Authorization: Bearer …` to these URLs, and never shown.
        protocol: `reward` is `POST /reward`, one sample per request; `v1` is `POST /v1/rewards`, many per request;
            `auto` detects which of the two each server supports.
        max_workers: Maximum requests in flight over all servers; fewer if a server is overloaded.
        batch_size: Maximum samples per request, if the protocol allows several.
        timeouts, retries, breaker: See `Timeouts`, `Retries` and `Breaker`.
        cache_dir: Folder to cache scores in; none by default. It is used only if the server's version is known, from
            `/v1/rewards` or `server_version`.
        server_version: Version of servers that do not report one.
        transport: An asynchronous httpx transport; by default a lean one of this package. For a proxy, use
            `httpx.AsyncHTTPTransport(proxy=…)`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is invalid. Messages hold no secret.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        protocol: ProtocolName = "auto",
        max_workers: int = 10,
        batch_size: int = 32,
        timeouts: Timeouts | None = None,
        retries: Retries | None = None,
        breaker: Breaker | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        server_version: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if protocol not in get_args(ProtocolName):
            raise ValueError(f"protocol is one of {', '.join(get_args(ProtocolName))}, not {protocol!r}")
        _check_types(
            urls=(urls, str | Sequence),
            token=(token, str | None),
            timeouts=(timeouts, Timeouts | None),
            retries=(retries, Retries | None),
            breaker=(breaker, Breaker | None),
            cache_dir=(cache_dir, str | os.PathLike | None),
            server_version=(server_version, str | None),
            transport=(transport, httpx.AsyncBaseTransport | None),
        )
        _check_count("max_workers", max_workers)
        _check_count("batch_size", batch_size)
        self._addresses, self._secrets = read_addresses(urls, token)
        self._protocol: ProtocolName = protocol
        options = DispatchOptions(
            protocol, timeouts or Timeouts(), retries or Retries(), batch_size, server_version
        )
        self._window = 4 * max_workers * batch_size
        self._sender = Sender(transport or AsyncioTransport(), options.timeouts)
        self._dispatcher = Dispatcher(
            [Endpoint(a, breaker or Breaker(), _known_dialect(protocol)) for a in self._addresses],
            self._sender,
            options,
            max_workers,
            ScoreCache(cache_dir) if cache_dir is not None else None,
            self._secrets,
        )
        self._closed = False

    def __repr__(self) -> str:
        return f"RewardClient({', '.join(address.shown for address in self._addresses)})"

    @property
    def max_workers(self) -> int:
        """Maximum requests in flight; may be changed at any time."""
        return self._dispatcher.max_workers

    @max_workers.setter
    def max_workers(self, value: int) -> None:
        _check_count("max_workers", value)
        self._dispatcher.max_workers = value

    def submit(self, sample: RewardSample) -> asyncio.Future[Outcome]:
        """Queue a sample and return a future of its outcome; call this on the event loop's thread.

        Raises:
            TypeError: `sample` is not a `RewardSample`.
            RuntimeError: the client is closed, or belongs to another event loop.
        """
        checked(sample)
        if self._closed:
            raise RuntimeError("the reward client is closed")
        return self._dispatcher.submit(sample)

    async def score(self, sample: RewardSample) -> Outcome:
        """Score one sample."""
        return await self.submit(sample)

    async def score_batch(self, samples: Iterable[RewardSample]) -> list[Outcome]:
        """Score samples and return their outcomes in the same order.

        Raises:
            TypeError: one of them is not a `RewardSample`; none is sent then.
        """
        return await asyncio.gather(*map(self.submit, [checked(sample) for sample in samples]))

    def score_stream(
        self, samples: Iterable[RewardSample] | AsyncIterable[RewardSample]
    ) -> AsyncIterator[tuple[RewardSample, Outcome]]:
        """Score samples and yield each with its outcome as it finishes.

        `samples` is consumed lazily, ahead of scoring by a few times the samples in flight; what it raises is raised
        here. An iterable that blocks must be asynchronous.

        Raises:
            TypeError: `samples` is not iterable (at the call), or yields something other than a `RewardSample`.
        """
        _check_types(samples=(samples, Iterable | AsyncIterable))
        return stream(samples, self.submit, self._window)

    async def capabilities(self) -> dict[str, Capabilities | Failed | None]:
        """Query the capabilities of each server; None for one without `/v1/rewards`."""
        answers = await asyncio.gather(*[ask_capabilities(self._sender, a) for a in self._addresses])
        return {
            address.shown: self._hidden(answer) if isinstance(answer, Failed) else answer
            for address, answer in zip(self._addresses, answers, strict=True)
        }

    async def ping(self) -> dict[str, float | Failed]:
        """Ping each server; return the seconds it took to answer, or the failure."""

        async def timed(index: int) -> float | Failed:
            began = time.perf_counter()
            failure = await ping(self._sender, self._addresses[index], self._protocol)
            return time.perf_counter() - began if failure is None else self._hidden(failure)

        answers = await asyncio.gather(*map(timed, range(len(self._addresses))))
        return {address.shown: answer for address, answer in zip(self._addresses, answers, strict=True)}

    async def aclose(self) -> None:
        """Close the connections; futures without an outcome are cancelled."""
        if not self._closed:
            self._closed = True
            await self._dispatcher.aclose()
            await self._sender.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _hidden(self, failure: Failed) -> Failed:
        return Failed(failure.kind, failure.attempts, self._secrets.hide(failure.detail))


def _check_types(**arguments: tuple[Any, Any]) -> None:
    """Raise `TypeError` for the first argument, given as (value, type), of a wrong type."""
    for name, (value, wanted) in arguments.items():
        if not isinstance(value, wanted):
            raise TypeError(f"{name} cannot be of type {type(value).__name__}")


def _check_count(name: str, value: Any) -> None:
    _check_types(**{name: (value, int)})
    if value < 1:
        raise ValueError(f"{name} must be at least 1")


def _known_dialect(protocol: ProtocolName):
    """Return the dialect if it is known without probing the server."""
    return None if protocol in ("auto", "v1") else DIALECTS[protocol]
