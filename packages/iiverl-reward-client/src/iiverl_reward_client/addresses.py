"""Parse the addresses of servers, and keep secrets out of messages."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

_HIDDEN = "[secret]"
# A shorter query value is too likely to be an ordinary word or number.
_SHORTEST_QUERY_SECRET = 6


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """A server's address: `url` has no user name and password, `shown` no query either."""

    url: httpx.URL = field(repr=False)
    shown: str
    authorization: str | None = field(repr=False)

    def at(self, path: str) -> httpx.URL:
        """Return the URL of `path` below this address; an empty path means the address itself."""
        return self.url.copy_with(path=self.url.path.rstrip("/") + path) if path else self.url


class Secrets:
    """Strings that must not be shown; `hide` removes them from a text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({secret for secret in secrets if secret}, key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Secrets({len(self._secrets)})"

    def hide(self, text: str) -> str:
        """Replace every secret in a text."""
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text

    def hide_in(self, value: Any) -> Any:
        """Replace every secret in the strings of a JSON value."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_in(part) for key, part in value.items()}
        return [self.hide_in(part) for part in value] if isinstance(value, list) else value


def read_addresses(urls: str | Sequence[str], token: str | None) -> tuple[list[Address], Secrets]:
    """Parse the URLs of servers into addresses and secrets.

    Raises:
        ValueError: there is no URL, one is not http or https, both URL and token have credentials, or the token is
            invalid in an HTTP header. Messages hold no secret.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    if not given:
        raise ValueError("give the URL of at least one reward server")
    if token is not None and (not token.isascii() or not token.isprintable() or not token or " " in token):
        raise ValueError("the token is empty, or has characters that are invalid in an HTTP header")
    addresses, secrets = [], [token or ""]
    for text in given:
        url = _parsed(text)
        bare = url.copy_with(username=None, password=None)
        authorization = f"Bearer {token}" if token else None
        if url.username or url.password:
            if token:
                raise ValueError(f"{_shown(bare)}: give either a token or credentials in the URL, not both")
            pair = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
            authorization = f"Basic {pair}"
            secrets += [url.password, pair]
        secrets += [value for _, value in url.params.multi_items() if len(value) >= _SHORTEST_QUERY_SECRET]
        addresses.append(Address(bare, _shown(bare), authorization))
    return addresses, Secrets(secrets)


def _parsed(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        url = None
    if url is None or url.scheme not in ("http", "https") or not url.host:
        # An invalid URL may still hold a password, so only its beginning is shown.
        beginning = str(text).partition("://")[0][:8] if "://" in str(text) else "text without ://"
        raise ValueError(f"a reward server's URL looks like http://host:8000; got {beginning}…") from None
    return url


def _shown(url: httpx.URL) -> str:
    return str(url.copy_with(query=None, fragment=None)).rstrip("/")
