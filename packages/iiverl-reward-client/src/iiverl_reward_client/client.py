"""The asynchronous client: samples in, an outcome for each, from one reward server or several."""

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
from iiverl_reward_client.dispatcher import Dispatcher, Settings
from iiverl_reward_client.endpoint import Breaker, Endpoint
from iiverl_reward_client.exchange import Sender
from iiverl_reward_client.outcomes import Failed, Outcome
from iiverl_reward_client.probing import DIALECTS, ask_capabilities, ping
from iiverl_reward_client.retrying import Retries, Timeouts
from iiverl_reward_client.sample import RewardSample, checked
from iiverl_reward_client.streaming import stream


class RewardClient:
    """Scores samples on reward servers. Every sample comes to a `Scored` or a `Failed`; scoring never raises for one.

    Args:
        urls: of one server or several that score alike; each request goes to the one with the fewest under way. For
            `openrlhf` and `slime` the URL is the one that is posted to, for the others the paths are added to it.
        token: sent as `Authorization: Bearer …` to these URLs, and shown nowhere.
        protocol: `reward` is `POST /reward`, a sample a request; `v1` is `POST /v1/rewards`, many a request; `auto`
            finds out which of the two each server speaks.
        max_workers: requests under way at most, over all servers. Fewer where a server says it is overloaded.
        batch_size: samples in a request at most, where the protocol takes several.
        timeouts, retries, breaker: see there.
        cache_dir: folder for scores that are not to be asked for again; none by default. It is used where the
            server's version is known: `/v1/rewards` tells it, and for other servers `server_version` does.
        server_version: of servers that do not tell theirs.
        transport: what carries the requests, any of httpx's asynchronous transports; a lean one of this package by
            default. For a proxy give `httpx.AsyncHTTPTransport(proxy=…)`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument has an invalid value. No message holds a secret.
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
        settings = Settings(
            protocol, timeouts or Timeouts(), retries or Retries(), batch_size, server_version
        )
        self._window = 4 * max_workers * batch_size
        self._sender = Sender(transport or AsyncioTransport(), settings.timeouts)
        self._dispatcher = Dispatcher(
            [Endpoint(a, breaker or Breaker(), _known_dialect(protocol)) for a in self._addresses],
            self._sender,
            settings,
            max_workers,
            ScoreCache(cache_dir) if cache_dir is not None else None,
            self._secrets,
        )
        self._closed = False

    def __repr__(self) -> str:
        return f"RewardClient({', '.join(address.shown for address in self._addresses)})"

    @property
    def max_workers(self) -> int:
        """Requests under way at most; may be changed at any time."""
        return self._dispatcher.max_workers

    @max_workers.setter
    def max_workers(self, value: int) -> None:
        _check_count("max_workers", value)
        self._dispatcher.max_workers = value

    def submit(self, sample: RewardSample) -> asyncio.Future[Outcome]:
        """Take a sample and return at once, on the event loop's thread; the future will hold the outcome.

        Raises:
            TypeError: `sample` is not a `RewardSample`.
            RuntimeError: the client is closed, or was used on another event loop before.
        """
        checked(sample)
        if self._closed:
            raise RuntimeError("the reward client is closed")
        return self._dispatcher.submit(sample)

    async def score(self, sample: RewardSample) -> Outcome:
        """Score one sample."""
        return await self.submit(sample)

    async def score_batch(self, samples: Iterable[RewardSample]) -> list[Outcome]:
        """Score samples and give their outcomes in the same order.

        Raises:
            TypeError: one of them is not a `RewardSample`; then none is sent.
        """
        return await asyncio.gather(*map(self.submit, [checked(sample) for sample in samples]))

    def score_stream(
        self, samples: Iterable[RewardSample] | AsyncIterable[RewardSample]
    ) -> AsyncIterator[tuple[RewardSample, Outcome]]:
        """Score samples and give each with its outcome as it finishes.

        `samples` is read while others are being scored, ahead of them by a few times what can be under way. What it
        raises is raised here. An iterable that waits for something must be an asynchronous one.

        Raises:
            TypeError: `samples` is not iterable (at the call), or yields something else than a `RewardSample`.
        """
        _check_types(samples=(samples, Iterable | AsyncIterable))
        return stream(samples, self.submit, self._window)

    async def capabilities(self) -> dict[str, Capabilities | Failed | None]:
        """Ask every server what it can do: None where it does not speak `/v1/rewards`."""
        answers = await asyncio.gather(*[ask_capabilities(self._sender, a) for a in self._addresses])
        return {
            address.shown: self._hidden(answer) if isinstance(answer, Failed) else answer
            for address, answer in zip(self._addresses, answers, strict=True)
        }

    async def ping(self) -> dict[str, float | Failed]:
        """See which servers answer: the seconds that took, or why there was no answer."""

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
    """Raise TypeError for the first argument, given as (value, type), that is not of its type."""
    for name, (value, wanted) in arguments.items():
        if not isinstance(value, wanted):
            raise TypeError(f"{name} cannot be of type {type(value).__name__}")


def _check_count(name: str, value: Any) -> None:
    _check_types(**{name: (value, int)})
    if value < 1:
        raise ValueError(f"{name} must be at least 1")


def _known_dialect(protocol: ProtocolName):
    """Give the dialect that can be spoken without asking the server first."""
    return None if protocol in ("auto", "v1") else DIALECTS[protocol]
