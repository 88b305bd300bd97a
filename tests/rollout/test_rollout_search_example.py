"""The example `search_r1`: its function asks a server as the README says, and its reward compares answers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from iiverl_core.config import load
from iiverl_core.python_files import load_file
from iiverl_core.tool_process import schema_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "search_r1"
LIBRARY = {"capital of France": ["Paris is the capital.", "Lyon is not."], "nothing": []}


class Retrieval(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked == {"queries": asked["queries"], "topk": 3, "return_scores": True}
        found = [
            [{"document": {"contents": text}, "score": 1.0} for text in LIBRARY[query]]
            for query in asked["queries"]
        ]
        body = json.dumps({"result": found}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def tools() -> Iterator[ModuleType]:
    server = HTTPServer(("127.0.0.1", 0), Retrieval)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _, module = load_file(EXAMPLE / "tools.py", "path")
    before, module.URL = module.URL, f"http://127.0.0.1:{server.server_port}/retrieve"
    yield module
    module.URL = before
    server.shutdown()
    thread.join()
    server.server_close()


def test_passages_are_numbered(tools: ModuleType) -> None:
    assert tools.search("capital of France") == "[1] Paris is the capital.\n[2] Lyon is not."
    assert tools.search("nothing") == "Nothing was found."
    assert schema_of("search", tools.search)["function"]["parameters"]["required"] == ["query"]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("It is <answer>The Eiffel-Tower!</answer>", 1.0),
        ("<answer>Louvre</answer> or rather <answer>eiffeltower</answer>", 1.0),
        ("<answer>Eiffel Tower</answer>", 0.0),
        ("the Eiffel-Tower", 0.0),
        ("<answer>the</answer>", 0.0),
    ],
)
def test_the_last_answer_counts(response: str, score: float) -> None:
    _, module = load_file(EXAMPLE / "reward.py", "path")
    extra = {"messages": [{"role": "user"}, {"role": "assistant"}, {"role": "tool"}, {"role": "assistant"}]}
    scored = module.compute_score("nq", response, ["Eiffel-Tower"], extra)
    assert scored == {"score": score, "answered": float("<answer>" in response), "searches": 1}


def test_the_configuration_is_valid_but_for_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    loaded = load(
        Path("search_r1.yaml"), ["data.train_files=null", "data.val_files=null", "trainer.test_freq=-1"]
    )
    assert loaded.run.rollout.multi_turn.tools.names == ("search",)
