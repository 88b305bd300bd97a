"""HTTP to the services that verifiers use: a judge, Sandbox Fusion.

Responses are bounded and never decompressed, requests can hold any text, and local services are not reached through a
proxy.
"""

import ipaddress
import json
from typing import Any

import httpx

_HEADERS = {"Accept-Encoding": "identity", "Content-Type": "application/json"}


class OversizedError(Exception):
    """A response is too long, or was compressed unasked."""


def uses_proxy(url: str) -> bool:
    """Return whether the environment's proxies apply to a URL: not to one on this machine or in its network."""
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:  # reported when it is used
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".localhost"))
    return not (address.is_private or address.is_loopback or address.is_link_local)


async def post(client: httpx.AsyncClient, url: str, document: Any, max_bytes: int) -> httpx.Response:
    """Post JSON and read the response, of at most `max_bytes`.

    Unpaired surrogates, which a model's text may hold and UTF-8 cannot encode, are sent as question marks.

    Raises:
        OversizedError: it is longer, or compressed.
        httpx.HTTPError: there is no response.
    """
    async with client.stream("POST", url, content=_encoded(document), headers=_HEADERS) as response:
        body = _Body(response, max_bytes)
        async for part in response.aiter_raw():
            body.add(part)
        return body.response()


def post_sync(
    client: httpx.Client, url: str, document: Any, max_bytes: int, *, timeout: float
) -> httpx.Response:
    """Post as `post` does, on this thread."""
    with client.stream(
        "POST", url, content=_encoded(document), headers=_HEADERS, timeout=timeout
    ) as response:
        body = _Body(response, max_bytes)
        for part in response.iter_raw():
            body.add(part)
        return body.response()


def _encoded(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


class _Body:
    """The part of a response's body that has been read."""

    def __init__(self, response: httpx.Response, max_bytes: int) -> None:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise OversizedError(f"the response is compressed ({encoding[:20]}), which was not asked for")
        self._response = response
        self._max_bytes = max_bytes
        self._content = bytearray()

    def add(self, part: bytes) -> None:
        self._content += part
        if len(self._content) > self._max_bytes:
            raise OversizedError(f"the response is longer than {self._max_bytes} bytes")

    def response(self) -> httpx.Response:
        return httpx.Response(
            self._response.status_code, headers=self._response.headers, content=bytes(self._content)
        )
