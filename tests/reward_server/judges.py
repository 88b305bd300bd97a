"""A judge: a server of the OpenAI protocol that answers as a test says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOO_LONG = {
    "error": {"message": "This model's maximum context length is 4096 tokens. However, you requested 9000"}
}


class Judge(ThreadingHTTPServer):
    """Answers as the test says, and keeps what it was asked.

    `said` is the judgement, or a function of the JSON object that the user message holds; requests whose messages have
    more characters than `context` are refused.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.headers, self.delay = 200, {}, 0.0
        self.said: str | Callable[[Any], str] = "VERDICT: MATCH"
        self.context: int | None = None
        self.document: Any = None
        self.finish_reason: str | None = "stop"
        self.asked: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/"

    def answer(self, body: Any) -> tuple[int, Any]:
        """Return the status and the document for a request."""
        texts = [message["content"] for message in body["messages"]]
        if self.context is not None and len(texts[-1]) > self.context:
            return 400, TOO_LONG
        said = self.said if isinstance(self.said, str) else self.said(json.loads(texts[-1]))
        choice = {"message": {"content": said}, "finish_reason": self.finish_reason}
        return self.status, self.document or {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        judge = self.server
        assert isinstance(judge, Judge)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        judge.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        time.sleep(judge.delay)
        status, document = judge.answer(body)
        self.send_response(status)
        for name, value in judge.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def judging() -> Iterator[Judge]:
    """Run a judge until the block ends."""
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
