"""A Hugging Face Hub small enough to be served by a test: dataset repositories in memory, read over loopback.

It answers what `datasets` and `huggingface_hub` ask while they load a dataset: the repository's commit and files
(`/api/datasets/…`), and each file (`/datasets/…/resolve/…`), with the headers and error codes of the Hub. The
endpoint is read from `HF_ENDPOINT` when those libraries are imported, so what loads from here is a process of its own.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


class HubError(Exception):
    """No: the code that the Hub puts into `X-Error-Code`."""


class Repository:
    """The commits of one dataset, by hash, and the names (branches, tags) of some."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.names: dict[str, str] = {}

    def commit(self, revision: str) -> tuple[str, Files]:
        sha = self.names.get(revision, revision)
        if sha not in self.commits:
            raise HubError("RevisionNotFound")
        return sha, self.commits[sha]


class HubServer:
    """A context manager: the server runs in a thread from entry to exit, at `url`.

    `requests` lists what was asked, such as `GET /api/datasets/org/name`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.refused: set[str] = set()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, files: Files, revision: str = "main") -> str:
        """Commit `files` (path to contents) to `repo`, name the commit `revision`, and return its hash."""
        repository = self.repositories.setdefault(repo, Repository())
        sha = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        repository.commits[sha] = dict(files)
        repository.names[revision] = sha
        return sha

    def refuse(self, repo: str) -> None:
        """Answer for `repo` as for a dataset that one must log in to read."""
        self.refused.add(repo)

    def environment(self, home: str) -> dict[str, str]:
        """What a process that loads from this server has in its environment; caches lie under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _folders(files: Files) -> set[str]:
    return {path.rsplit("/", depth)[0] for path in files for depth in range(1, path.count("/") + 1)}


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    if folder and folder not in _folders(files):
        raise HubError("EntryNotFound")
    entries = [_entry(path, files[path]) for path in sorted(files)]
    entries += [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(_folders(files))
    ]
    inside = [entry for entry in entries if entry["path"].startswith(prefix)]
    return [entry for entry in inside if recursive or "/" not in entry["path"][len(prefix) :]]


def _paths_info(files: Files, paths: list[str]) -> list[dict[str, Any]]:
    found = [_entry(path, files[path]) for path in paths if path in files]
    folders = [path for path in paths if path in _folders(files)]
    return found + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self._route(body)
        except HubError as error:
            code = str(error)
            self._send(401 if code == "GatedRepo" else 404, b'{"error": "no"}', {"X-Error-Code": code})

    def _route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        kind, *parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if kind == "api" and parts[0] == "datasets":
            end = next(
                (i for i, part in enumerate(parts) if part in ("revision", "tree", "paths-info")), len(parts)
            )
            self._api("/".join(parts[1:end]), parts[end:], parse_qs(url.query), body)
        elif kind == "api" and parts[0] == "models":
            raise HubError("RepoNotFound")
        elif kind == "datasets" and "resolve" in parts:
            end = parts.index("resolve")
            self._resolve("/".join(parts[:end]), parts[end + 1], "/".join(parts[end + 2 :]))
        else:
            raise HubError("EntryNotFound")

    def _repository(self, repo: str) -> Repository:
        if repo in self.hub.refused:
            raise HubError("GatedRepo")
        if repo not in self.hub.repositories:
            raise HubError("RepoNotFound")
        return self.hub.repositories[repo]

    def _api(self, repo: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        what, revision = rest[:2] or ["revision", "main"]
        sha, files = self._repository(repo).commit(revision)
        if what == "tree":
            answer: Any = _tree(files, "/".join(rest[2:]), query.get("recursive") == ["true"])
        elif what == "paths-info":
            asked = parse_qs(body.decode()) if b"=" in body else json.loads(body)
            answer = _paths_info(files, asked["paths"])
        else:
            answer = {"id": repo, "sha": sha, "private": False, "gated": False, "disabled": False}
            answer |= {
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in files],
            }
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self._repository(repo).commit(revision)
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = f'"{_entry(path, files[path])["oid"]}"'
        self._send(200, files[path], {"ETag": etag, "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
