"""Check whether a server is up, and detect its protocol."""

from dataclasses import dataclass

import httpx

from iiverl_reward_client.addresses import Address
from iiverl_reward_client.dialects import (
    OPENRLHF,
    REWARD,
    SLIME,
    V1,
    Capabilities,
    Dialect,
    ProtocolName,
    read_capabilities,
)
from iiverl_reward_client.exchange import Sender, failure_of
from iiverl_reward_client.outcomes import Failed
from iiverl_reward_client.protocol import failure_of_status
from iiverl_reward_client.retrying import retry_after

_CAPABILITIES = "/v1/capabilities"

DIALECTS: dict[ProtocolName, Dialect] = {"reward": REWARD, "v1": V1, "openrlhf": OPENRLHF, "slime": SLIME}


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answered."""

    dialect: Dialect
    capabilities: Capabilities | None = None


@dataclass(frozen=True, slots=True)
class Missed:
    """A server that did not answer; `wait` is its `Retry-After` in seconds."""

    failure: Failed
    wait: float | None = None


async def probe(sender: Sender, address: Address, protocol: ProtocolName) -> Found | Missed:
    """Check whether a server can be used, and detect its protocol if that is `auto`.

    A server that refuses the request is up; one that fails or is too busy is not.
    """
    asks = protocol in ("auto", "v1")
    try:
        response = await sender.get(address, _CAPABILITIES if asks else DIALECTS[protocol].ping)
    except httpx.RequestError as error:
        return Missed(failure_of(error))
    status = response.status_code
    if status >= 500 or status in (408, 429):
        return Missed(
            failure_of_status(status, response.content), retry_after(response.headers.get("Retry-After"))
        )
    capabilities = read_capabilities(response.content) if asks and status == 200 else None
    if protocol == "auto":
        return Found(V1 if capabilities else REWARD, capabilities)
    return Found(DIALECTS[protocol], capabilities)


async def ask_capabilities(sender: Sender, address: Address) -> Capabilities | Failed | None:
    """Query a server's capabilities; None if it uses another protocol."""
    try:
        response = await sender.get(address, _CAPABILITIES)
    except httpx.RequestError as error:
        return failure_of(error)
    if response.status_code == 200:
        return read_capabilities(response.content)
    return None if response.status_code in (404, 405) else _failed(response)


async def ping(sender: Sender, address: Address, protocol: ProtocolName) -> Failed | None:
    """Return None if a server answers, or else the failure.

    `/ping` must return 200. The servers of OpenRLHF and slime have no such path: any status below 500 is an answer.
    """
    dialect = DIALECTS.get(protocol, REWARD)
    try:
        response = await sender.get(address, dialect.ping)
    except httpx.RequestError as error:
        return failure_of(error)
    ok = response.status_code == 200 if dialect.ping_is_200 else response.status_code < 500
    return None if ok else _failed(response)


def _failed(response: httpx.Response) -> Failed:
    return failure_of_status(response.status_code, response.content)
