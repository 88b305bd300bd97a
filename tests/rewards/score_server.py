"""A small reward server of the tests' own: `/reward`, and `/v1/rewards` unless it is an old one."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Score = Callable[[str, dict], Any]


def boxed(text: str, info: dict) -> float:
    """Score 1 where the text ends in the answer, boxed."""
    return float(text.endswith(f"\\boxed{{{info['answer']['value']}}}"))


class ScoreServer:
    """Scores by `score(response or whole output, verification_info)`; what that returns may be an error of `/v1`."""

    def __init__(self, score: Score = boxed, *, old: bool = False, token: str | None = None) -> None:
        self.samples: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_GET(self) -> None:
                if self.path == "/ping":
                    self.answer(200, {"status": "ok"})
                elif self.path == "/v1/capabilities" and not old:
                    self.if_allowed(
                        {
                            "protocol": "iiverl-rewards/1",
                            "server_version": "7",
                            "types": ["math_verifiable"],
                            "unavailable": {"llm_judge": "no judge is set"},
                        }
                    )
                else:
                    self.answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/reward":
                    self.if_allowed({"score": outer.give(body)})
                else:
                    results = [
                        {"id": sample["id"], **(given if isinstance(given, dict) else {"score": given})}
                        for sample in body["samples"]
                        for given in [outer.give(sample)]
                    ]
                    self.if_allowed({"server_version": "7", "results": results})

            def if_allowed(self, document: dict) -> None:
                if token is not None and self.headers["Authorization"] != f"Bearer {token}":
                    self.answer(401, {"detail": "a token is needed"})
                else:
                    self.answer(200, document)

            def answer(self, status: int, document: dict) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._score = score
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def give(self, sample: dict) -> Any:
        self.samples.append(sample)
        info = sample["verification_info"]
        return self._score(
            sample.get("response") or sample["llm_output"],
            json.loads(info) if isinstance(info, str) else info,
        )

    def __enter__(self) -> "ScoreServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
