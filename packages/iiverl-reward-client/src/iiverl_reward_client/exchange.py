"""Send a request, and classify its failure."""

import httpx

from iiverl_reward_client.addresses import Address
from iiverl_reward_client.outcomes import Failed
from iiverl_reward_client.retrying import Timeouts

_AGENT = ("User-Agent", "iiverl-reward-client")
_ACCEPT = ("Accept", "application/json")
_JSON = ("Content-Type", "application/json")
_MAX_BYTES = 64 * 2**20


class Sender:
    """Sends requests through an httpx transport.

    It bypasses `httpx.AsyncClient`, whose cookies, redirects and logging are not needed: a token is sent only to the
    address it was given for.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, timeouts: Timeouts) -> None:
        self._transport = transport
        self._urls: dict[tuple[Address, str], httpx.URL] = {}  # joining URLs is slow
        read = timeouts.read
        self._extensions = {
            "timeout": {"connect": timeouts.connect, "read": read, "write": read, "pool": read}
        }

    async def post(self, address: Address, path: str, body: bytes) -> httpx.Response:
        """Send JSON and read the response; raises `httpx.RequestError` if there is none."""
        return await self._send("POST", address, path, body)

    async def get(self, address: Address, path: str) -> httpx.Response:
        """Send a GET and read the response; raises `httpx.RequestError` if there is none."""
        return await self._send("GET", address, path, None)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    async def _send(self, method: str, address: Address, path: str, body: bytes | None) -> httpx.Response:
        url = self._urls.get((address, path))
        if url is None:
            url = self._urls[address, path] = address.at(path)
        headers = [_AGENT, _ACCEPT]
        if body is not None:
            headers.append(_JSON)
        if address.authorization is not None:
            headers.append(("Authorization", address.authorization))
        request = httpx.Request(method, url, headers=headers, content=body, extensions=self._extensions)
        response = await self._transport.handle_async_request(request)
        try:
            if not response.is_closed:
                # Another transport's, read part by part: a small compressed body may become a large one.
                size = 0
                parts: list[bytes] = []
                async for part in response.aiter_bytes():
                    size += len(part)
                    if size > _MAX_BYTES:
                        raise httpx.DecodingError(f"the answer is longer than {_MAX_BYTES} bytes")
                    parts.append(part)
                headers = [
                    (name, value)
                    for name, value in response.headers.multi_items()
                    if name not in ("content-encoding", "content-length")
                ]
                return httpx.Response(response.status_code, headers=headers, content=b"".join(parts))
        finally:
            await response.aclose()
        return response


def failure_of(error: httpx.RequestError) -> Failed:
    """Classify a request without a response."""
    detail = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return Failed("timeout", detail=detail)
    if isinstance(error, httpx.TransportError):
        return Failed("transport", detail=detail)
    return Failed("bad_response", detail=detail)
