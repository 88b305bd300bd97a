"""Tools of the user's: their results and errors are messages to the model, and what breaks ends one rollout."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.errors import ConfigError
from iiverl_core.rollout import Completion, GenerationRequest, RolloutRequest, RolloutTokens
from iiverl_core.rollout.tools import OUTPUT, ToolRollouter, shortened
from iiverl_core.samples import Prompt, SampleId
from iiverl_core.tool_process import schema_of
from iiverl_reward_client import Failed
from rollout.chat_templates import tokenizer_of

NAME = "qwen2.5"
TOOLS = '''
import asyncio, os, random, sys, time
from pathlib import Path


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second,
            which may be left out.
    """
    print("adding")
    return a + b


async def later(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "<|im_end|>later"


def fail(how: str):
    """Go wrong."""
    if how == "raise":
        raise ValueError("no such thing")
    if how == "exit":
        sys.exit(3)
    if how == "die":
        os._exit(3)
    if how == "long":
        return "abcdefghij" * 100
    if how == "odd":
        return {"set": {1}, "half": "\\ud800"}
    time.sleep(60)


def draw() -> float:
    """Draw a number."""
    return random.random()


def meet(folder: str, me: str) -> list[str]:
    """Wait until two calls are here."""
    Path(folder, me).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)
    return sorted(p.name for p in Path(folder).iterdir())
'''
NAMES = ["add", "later", "fail", "draw", "meet"]


def run_of(folder: Path, **keys: Any) -> RunConfig:
    path = folder / "my_tools.py"
    path.write_text(TOOLS)
    tools = {"path": str(path), "names": NAMES, "timeout": 1.0, **keys.pop("tools", {})}
    rollout = {
        "name": "hf",
        "agent": {"default_agent_loop": "tool_agent"},
        "multi_turn": {"max_tool_response_length": 100, **keys, "tools": tools},
    }
    lengths = {"max_prompt_length": 3000, "max_response_length": 1500}
    trainer = {"default_local_dir": str(folder / "run")}
    return run_config(build({"actor_rollout_ref": {"rollout": rollout}, "data": lengths, "trainer": trainer}))


@pytest.fixture(scope="module")
def rollouter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolRollouter]:
    made = ToolRollouter(run_of(tmp_path_factory.mktemp("tools")), tokenizer_of(NAME))
    yield made
    made.close()
    assert "iiverl-user-code" not in {thread.name for thread in threading.enumerate()}


class Script:
    """A policy that says what it is given; a `Generate`."""

    weights_version = 7

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self.prompts = list(texts), []

    async def __call__(
        self, prompt_ids: Sequence[int], *, max_tokens: int | None = None, images: Sequence[Any] = ()
    ) -> Completion:
        self.prompts.append(list(prompt_ids))
        ids = tokenizer_of(NAME)(self._texts.pop(0) + "<|im_end|>", add_special_tokens=False)["input_ids"]
        cut = max_tokens is not None and len(ids) > max_tokens
        tokens = np.array(ids[:max_tokens], dtype=np.int64)
        request = GenerationRequest(SampleId("train", 1, 0, 0), prompt_ids)
        return Completion(request, tokens, np.zeros(len(tokens), np.float32), "length" if cut else "stop", 7)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def rollout(rollouter: ToolRollouter, *texts: str, seed: int = 1) -> RolloutTokens:
    chat = ({"role": "user", "content": "What is 2 + 3?"},)
    prompt = Prompt(0, (1, 2), "What is 2 + 3?", chat=chat, source="rows")
    request = RolloutRequest(SampleId("train", 1, 0, 0), prompt, seed)
    return asyncio.run(rollouter.rollout(request, Script(texts)))


def results(done: RolloutTokens) -> list[str]:
    return [message["content"] for message in done.messages or () if message["role"] == "tool"]


def test_calls_are_answered_until_there_are_none(rollouter: ToolRollouter) -> None:
    done = rollout(rollouter, call("add", a=2, b=3) + "\n" + call("add", a=2), "So it is 5.")
    assert results(done) == ["5", "3"]
    assert [message["role"] for message in done.messages or ()] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert done.counts["tool_calls"] == 2 and done.counts["tool_errors"] == 0
    assert done.outcome is None and done.finish_reason == "stop" and done.weights_version == 7
    (sequence,) = done.sequences
    text = str(tokenizer_of(NAME).decode(sequence.token_ids))
    assert '"description": "The second, which may be left out."' in text
    assert text.endswith("So it is 5.<|im_end|>")
    trained = str(tokenizer_of(NAME).decode(sequence.token_ids[sequence.loss_mask]))
    assert trained == call("add", a=2, b=3) + "\n" + call("add", a=2) + "<|im_end|>So it is 5.<|im_end|>"


def test_what_goes_wrong_is_a_message_to_the_model(rollouter: ToolRollouter) -> None:
    done = rollout(
        rollouter,
        "\n".join(
            [
                call("fail", how="raise"),
                call("fail", how="exit"),
                call("fail", how="hang"),
                call("subtract"),
                call("add", c=1),
                '<tool_call>{"name": 5}</tool_call>',
                call("fail", how="long"),
                call("fail", how="odd"),
                call("later", seconds=0),
            ]
        ),
        "Oh.",
    )
    assert results(done) == [
        "Error: ValueError: no such thing",
        "Error: SystemExit: 3",
        "Error: fail took longer than 1 s",
        f"Error: there is no function 'subtract'; there are: {', '.join(NAMES)}",
        "Error: the arguments of add are wrong: missing a required argument: 'a'",
        'Error: the call has no "name" of a function',
        "abcdefghij" * 5 + "...(truncated)..." + "abcdefghij" * 5,
        '{"set": "{1}", "half": "\ufffd"}',
        "<|im_end|>later",
    ]
    assert done.counts["tool_errors"] == 6
    end = tokenizer_of(NAME).convert_tokens_to_ids("<|im_end|>")
    # of the system, the user, the call, the results and the answer: none that a tool printed
    assert (done.sequences[0].token_ids == end).sum() == 5


def test_a_tool_that_ends_its_process_fails_the_rollout_alone(rollouter: ToolRollouter) -> None:
    done = rollout(rollouter, call("fail", how="die"), "never")
    assert isinstance(done.outcome, Failed) and done.outcome.kind == "environment"
    assert "fail ended its process (exit code 3)" in done.outcome.detail
    assert results(rollout(rollouter, call("add", a=1), "Fine.")) == ["2"]


def test_the_calls_of_a_response_run_at_the_same_time(rollouter: ToolRollouter, tmp_path: Path) -> None:
    both = "\n".join(call("meet", folder=str(tmp_path), me=me) for me in "ab")
    assert results(rollout(rollouter, both, "Met.")) == ['["a", "b"]'] * 2


def test_random_numbers_of_tools_depend_on_the_seed_alone(rollouter: ToolRollouter) -> None:
    text = call("draw") + "\n" + call("draw")
    drawn = [results(rollout(rollouter, text, call("draw"), "x", seed=seed)) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(set(drawn[0])) == 3


def test_what_tools_print_goes_to_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    rollouter = ToolRollouter(run, tokenizer_of(NAME))
    rollout(rollouter, call("add", a=1), "x")
    rollouter.close()
    assert "adding" in (run.folder / OUTPUT).read_text()
    assert "adding" not in "".join(capfd.readouterr())


def test_a_rollout_ends_at_its_limits(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_assistant_turns=2)
    rollouter = ToolRollouter(run, tokenizer_of(NAME))
    done = rollout(rollouter, call("add", a=1), call("add", a=2), "never")
    assert results(done) == ["2"] and len(done.turns) == 2 and done.counts["tool_calls"] == 1
    done = rollout(rollouter, *[call("add", a=1) + "x" * 700] * 3)
    assert done.finish_reason == "length" and len(done.turns) == 2
    assert sum(len(sequence.token_ids) for sequence in done.sequences) <= 3000 + 1500
    rollouter.close()


def test_a_prompt_that_is_too_long_with_its_tools_fails(tmp_path: Path) -> None:
    rollouter = ToolRollouter(run_of(tmp_path), tokenizer_of(NAME))
    chat = ({"role": "user", "content": "q" * 3000},)
    request = RolloutRequest(SampleId("train", 1, 0, 0), Prompt(0, (1,), "", chat=chat, source="rows"), 1)
    done = asyncio.run(rollouter.rollout(request, Script([])))
    assert isinstance(done.outcome, Failed) and "data.max_prompt_length is 3000" in done.outcome.detail
    rollouter.close()


def test_tools_that_cannot_be_described_are_reported_before_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, tools={"names": ["Path"]})
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"multi_turn.tools.names: Path has"):
        ToolRollouter(run, tokenizer_of(NAME))
    left = set(threading.enumerate()) - before
    assert "iiverl-user-code" not in {thread.name for thread in left}


def test_schemas_come_from_type_hints_and_docstrings() -> None:
    def find(
        text: str,
        among: list[str],
        most: int | None = None,
        how: "Any" = 1,
        where: dict[str, float] | None = None,
    ) -> str:
        """Find a text.

        In many.

        Args:
            text: What to find.
            among (list): Where
                to look.

        Returns:
            The text.
        """
        return text

    described = schema_of("find", find)["function"]
    assert described["description"] == "Find a text.\n\nIn many."
    assert described["parameters"] == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "What to find."},
            "among": {"type": "array", "items": {"type": "string"}, "description": "Where to look."},
            "most": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "how": {},
            "where": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]
            },
        },
        "required": ["text", "among"],
    }

    def bare(text: str) -> None: ...

    def untyped(text) -> None:
        """Take anything."""

    def odd(text: complex, *rest: int) -> None:
        """Take too much."""

    for function, problem in (
        (bare, "no docstring"),
        (untyped, "no type hint for text"),
        (odd, "JSON cannot express"),
    ):
        with pytest.raises(ConfigError, match=problem):
            schema_of(function.__name__, function)


def test_a_long_result_is_shortened_as_verl_does() -> None:
    assert shortened("abcdef", 6, "left") == "abcdef"
    assert shortened("abcdef", 4, "left") == "abcd...(truncated)"
    assert shortened("abcdef", 4, "right") == "(truncated)...cdef"
    assert shortened("abcdef", 4, "middle") == "ab...(truncated)...ef"
    assert shortened("abcdef", 1, "middle") == "...(truncated)..."
