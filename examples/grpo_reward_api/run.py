"""Make inputs, start a reward server, train against it, and stop it.

    python examples/grpo_reward_api/run.py [KEY=VALUE …]

The model and the words are the quickstart's; the rows are as II-VERL's datasets have them:

    {"messages": [{"role": "user", "content": "cafe"}], "data_source": "echo",
     "verification_info": "{\\"type\\": \\"echo\\", \\"answer\\": {\\"value\\": \\"cafe\\"}}"}
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
IIVERL = Path(sys.executable).with_name("iiverl")
sys.path.insert(0, str(HERE.parent / "quickstart"))

import make_inputs as quickstart  # noqa: E402


def make_inputs(folder: Path) -> None:
    """Write `model/`, `train.jsonl` and `val.jsonl`."""
    folder.mkdir(exist_ok=True)
    quickstart.make_model(folder / "model")
    quickstart.make_data(folder)
    for name in ("train", "val"):
        file = folder / f"{name}.jsonl"
        words = [json.loads(line)["ground_truth"] for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(as_row(word)) + "\n" for word in words))


def as_row(word: str) -> dict:
    """Convert a word to a chat and its `verification_info`."""
    return {
        "messages": [{"role": "user", "content": word}],
        "data_source": "echo",
        "verification_info": json.dumps({"type": "echo", "answer": {"value": word}}),
    }


@contextmanager
def reward_server() -> Iterator[str]:
    """Run a reward server on a free port, and return its URL."""
    command = [
        IIVERL,
        "reward-server",
        "--port",
        "0",
        "--workers",
        "1",
        "--verifier",
        f"{HERE}/verifier.py:echo",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        first = server.stderr.readline()  # reward server on http://127.0.0.1:43210
        sys.stderr.write(first)
        threading.Thread(target=lambda pipe: sys.stderr.writelines(pipe), args=[server.stderr]).start()
        if "http://" not in first:
            raise SystemExit(server.wait())
        yield first.split()[-1]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that the server ends with this process
    make_inputs(HERE / "inputs")
    arguments = [f"{HERE}/grpo_reward_api.yaml", *sys.argv[1:]]
    with reward_server() as url:
        arguments.insert(1, f"reward_api.api_url={url}")
        code = subprocess.call([IIVERL, "reward", "check", *arguments])
        code = code or subprocess.call([IIVERL, "train-ppo", *arguments])
    sys.exit(code)
