"""Agents: what programs ask by the OpenAI API is trained on as it was sampled, and what they break is one rollout's."""

import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from iiverl_core.config import build, run_config
from iiverl_core.errors import ConfigError
from iiverl_core.rollout import Completion, GenerationRequest, RolloutTokens, SamplingParams, run_rollouts
from iiverl_core.rollout.agents import OUTPUT, AgentRollouter
from iiverl_core.samples import TokenSequence
from iiverl_reward_client import Failed, Scored
from rollout.scripted import ScriptedEngine, make_tokenizer, requests_of

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

# One function for all, so that processes import the client once.
AGENT = r"""
import asyncio, http.client, json, os, subprocess, sys, time
from urllib.parse import urlsplit
import openai


def agent(base_url, api_key, row):
    assert os.environ["OPENAI_BASE_URL"] == base_url and os.environ["OPENAI_API_KEY"] == api_key
    client = openai.OpenAI(max_retries=0)
    kind = row["extra_info"]["kind"]
    print("begun", kind, os.getpid(), flush=True)
    return globals()[kind](client, row)


def ask(client, messages, **more):
    return client.chat.completions.create(model="any", messages=messages, **more)


def turns(client, row):
    messages = list(row["prompt"])
    for number in range(3):
        done = ask(client, messages, temperature=0.3)
        messages += [done.choices[0].message.model_dump(), {"role": "user", "content": f"more {number}"}]
    return {"reward": 0.5, "length": len(messages), "seen": [m["content"] for m in messages], "usage": done.usage.total_tokens}


async def async_turns(client, row):
    async with openai.AsyncOpenAI() as other:
        messages = list(row["prompt"])
        for _ in range(2):
            done = await other.chat.completions.create(model="m", messages=messages)
            messages += [{"role": "assistant", "content": done.choices[0].message.content}, {"role": "user", "content": "on"}]
    return 1


async def parallel(client, row):
    async with openai.AsyncOpenAI(max_retries=0) as other:
        async def one(number):
            messages = [{"role": "user", "content": f"number {number}"}]
            for _ in range(2):
                done = await other.chat.completions.create(model="m", messages=messages)
                messages += [done.choices[0].message.model_dump(), {"role": "user", "content": "on"}]
        await asyncio.gather(*map(one, range(24)))


def stream(client, row):
    messages = list(row["prompt"])
    for _ in range(2):
        text, chunks = "", list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
        for chunk in chunks[:-1]:
            text += chunk.choices[0].delta.content or ""
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == len(text) + 1
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": [{"type": "text", "text": "on"}]}]


def left_stream(client, row):
    messages = list(row["prompt"])
    for _ in range(2):
        with ask(client, messages, stream=True) as chunks:
            text = next(iter(chunks)).choices[0].delta.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "on"}]
    text = client.completions.create(model="m", prompt="ab", stream=True)
    assert "".join(chunk.choices[0].text for chunk in text)


def several(client, row):
    ask(client, [{"role": "user", "content": "sub"}])
    first = ask(client, row["prompt"], n=3, logprobs=True)
    assert len(first.choices) == 3
    for choice in first.choices:
        tokens = choice.logprobs.content
        assert "".join(t.token for t in tokens) == choice.message.content + "<end>"
    chosen = {"role": "assistant", "content": first.choices[2].message.content}
    ask(client, [*row["prompt"], chosen, {"role": "user", "content": "go"}])
    done = client.completions.create(model="m", prompt="abc", max_tokens=1)
    return {"reward": 2, "text": done.choices[0].text, "reason": done.choices[0].finish_reason}


def rewrites(client, row):
    messages = list(row["prompt"])
    for _ in range(2):
        messages += [ask(client, messages).choices[0].message.model_dump(), {"role": "user", "content": "on"}]
    messages[1:3] = [{"role": "user", "content": "in short: <end>"}]
    for _ in range(2):
        messages += [ask(client, messages).choices[0].message.model_dump(), {"role": "user", "content": "on"}]


TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add one.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]


def tools(client, row):
    messages = list(row["prompt"])
    done = ask(client, messages, tools=TOOLS).choices[0]
    (call,) = done.message.tool_calls
    assert done.finish_reason == "tool_calls" and done.message.content is None and call.function.name == "add"
    result = str(json.loads(call.function.arguments)["a"] + 1)
    messages += [done.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": result}]
    assert ask(client, messages, tools=TOOLS, tool_choice="auto").choices[0].message.content == "fine"
    text = ask(client, row["prompt"], tools=TOOLS, tool_choice="none").choices[0]
    assert text.message.content.startswith("<tool") and text.finish_reason == "stop"


def streamed_tools(client, row):
    chunks = list(ask(client, row["prompt"], tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and [call.index for call in calls] == [0]
    call = {"id": calls[0].id, "type": "function", "function": calls[0].function.model_dump()}
    messages = [*row["prompt"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": "2"})
    assert ask(client, messages, tools=TOOLS).choices[0].message.content == "fine"


def impatient(client, row):
    messages, given_up = list(row["prompt"]), 0
    messages += [ask(client, messages).choices[0].message.model_dump(), {"role": "user", "content": "wait"}]
    while True:
        try:
            ask(client.with_options(timeout=0.5), messages, stream=given_up == 1)
            return {"reward": 1, "given_up": given_up}
        except openai.APITimeoutError:
            given_up += 1


def errors(client, row):
    assert [m.id for m in client.models.list()] == ["policy"] and client.models.retrieve("x/y").id == "policy"
    seen = {}
    for name, more in {
        "stop": {"stop": ["x"]},
        "format": {"response_format": {"type": "json_object"}},
        "choice": {"tool_choice": "required", "tools": TOOLS},
        "n": {"n": 0},
        "max_tokens": {"max_tokens": 0},
        "role": {"messages": [{"role": "narrator", "content": "x"}]},
        "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "last": {"messages": [{"role": "assistant", "content": "x"}]},
        "arguments": {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 9000}}]}]},
        "long": {"messages": [{"role": "user", "content": "x" * 500}]},
    }.items():
        try:
            client.chat.completions.create(model="m", **{"messages": row["prompt"], **more})
        except openai.BadRequestError as error:
            seen[name] = error.code or error.body["message"][:20]
    for url, key in ((client.base_url, "wrong"), (str(client.base_url).replace("train", "other"), client.api_key)):
        try:
            openai.OpenAI(base_url=url, api_key=key).models.list()
        except (openai.AuthenticationError, openai.NotFoundError) as error:
            seen[type(error).__name__] = error.code
    ask(client, row["prompt"])
    return {"reward": 0, **seen}


def post(client, body, path="chat/completions", **headers):
    url = urlsplit(str(client.base_url))
    connection = http.client.HTTPConnection(url.hostname, url.port)
    connection.request("POST", url.path + path, body, {"Authorization": "Bearer " + client.api_key, **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def sloppy(client, row):
    seen = {}
    user = {"role": "user", "content": "say"}
    for name, body in {
        "no JSON": b"{",
        "no object": b"[]",
        "no messages": b"{}",
        "no message": b'{"messages": [3]}',
        "deep": b'{"messages": ' + b"[" * 5000,
        "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "bytes": bytes(range(128, 200)),
        "nothing": b"",
        "content": json.dumps({"messages": [{"role": "user", "content": 5}]}).encode(),
    }.items():
        status, answer = post(client, body)
        seen[name] = status
        assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"], answer
    seen["many"] = post(client, json.dumps({"prompt": ["a"] * 65, "n": 2}).encode(), "completions")[0]
    seen["unknown token"] = post(client, json.dumps({"prompt": [1, 10**6]}).encode(), "completions")[0]
    seen["path"], _ = post(client, b"{}", "embeddings")
    seen["large"], _ = post(client, b"", **{"Content-Length": str(10**10)})
    sent = {"messages": [user], "stop": [], "seed": 3, "user": "x", "top_k": 5, "temperature": None, "other": {"x": [1]}}
    seen["fine"], answer = post(client, json.dumps(sent).encode())
    said = {"role": "assistant", "content": answer["choices"][0]["message"]["content"], "audio": None}
    more = {"messages": [user, said, {"role": "assistant", "content": None}, user]}
    seen["more"], _ = post(client, json.dumps(more).encode())
    return {"reward": 0, "info": seen}


def crash(client, row):
    ask(client, row["prompt"])
    raise ZeroDivisionError("broken by plan")


def dies(client, row):
    os.kill(os.getpid(), 9)


def hangs(client, row):
    ask(client, row["prompt"])
    time.sleep(60)


def silent(client, row):
    return 1.0


def children(client, row):
    print("begun sleep", subprocess.Popen(["sleep", "60"]).pid, flush=True)
    ask(client, row["prompt"])
    return 0.0


def garbage(client, row):
    ask(client, row["prompt"])
    return "good"


def nothing(client, row):
    ask(client, row["prompt"])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class CallingEngine(ScriptedEngine):
    """Calls a tool, unless a tool's result is the last message."""

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        prompt = self.tokenizer.decode(list(request.prompt_ids))
        is_result = "<tool>" in prompt.rpartition("<end>")[0].rpartition("<end>")[2]
        text = "fine" if is_result else CALL
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._pending[request] = [*ids, self._end], False, 0


class StuckEngine(ScriptedEngine):
    """Never answers prompts that end with "wait", until it has been told twice to forget one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.stuck: set[GenerationRequest] = set()
        self.forgotten = 0

    @property
    def pending(self) -> int:
        return super().pending + len(self.stuck)

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        waits = "wait<end>" in self.tokenizer.decode(list(request.prompt_ids))
        if waits and self.forgotten < 2:
            self.stuck.add(request)
        else:
            super().submit(request, params)

    def step(self) -> list[Completion]:
        time.sleep(0.001)  # else the server's thread gets little of the processor
        return super().step()

    def abort(self, requests: Collection[GenerationRequest]) -> None:
        self.forgotten += len(self.stuck & set(requests))
        self.stuck -= set(requests)
        super().abort(requests)


class BrokenEngine(ScriptedEngine):
    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        raise RuntimeError("no weights")


@pytest.fixture(scope="module")
def roll_out(tokenizer, tmp_path_factory) -> Callable[..., list[RolloutTokens]]:
    """Make the rollouts of rows with an agent, in the order of the rows, and close all."""

    def make(
        infos: Sequence[Any],
        engine: Any = None,
        tokens: Any = None,
        in_lockstep: bool = False,
        **section: Any,
    ) -> list[RolloutTokens]:
        folder = tmp_path_factory.mktemp("agents")
        if "command" not in section:
            (folder / "agents.py").write_text(section.pop("code", AGENT))
            section["path"] = str(folder / "agents.py")
        rollout = {
            "name": "hf",
            "agent": {"default_agent_loop": "agent"},
            "multi_turn": {"agent": {"workers": 2, **section}},
        }
        data = {"max_prompt_length": 64, "max_response_length": 128}
        trainer = {"default_local_dir": str(folder)}
        run = run_config(build({"actor_rollout_ref": {"rollout": rollout}, "data": data, "trainer": trainer}))
        rollouter = AgentRollouter(run, tokens or tokenizer)
        engine = engine or ScriptedEngine(tokenizer)
        params = SamplingParams(max_tokens=96)
        try:
            asked = requests_of(tokens or tokenizer, infos)
            done = list(run_rollouts(engine, rollouter, asked, params, in_lockstep=in_lockstep))
        finally:
            rollouter.close()
            assert engine.pending == 0
            assert not {thread.name for thread in threading.enumerate()} & {
                "iiverl-openai",
                "iiverl-user-code",
            }
            make.output = (folder / OUTPUT).read_text()
        return sorted(done, key=lambda each: each.id)

    return make


KINDS = (
    "turns",
    "async_turns",
    "parallel",
    "stream",
    "left_stream",
    "several",
    "rewrites",
    "errors",
    "sloppy",
    "crash",
    "dies",
    "children",
    "silent",
    "garbage",
    "nothing",
)


@pytest.fixture(scope="module")
def done(roll_out) -> dict[str, RolloutTokens]:
    """A rollout of each kind."""
    rollouts = roll_out([{"kind": kind} for kind in KINDS])
    return dict(zip(KINDS, rollouts, strict=True)) | {"output": roll_out.output}


def check_masks(tokenizer, rollout: RolloutTokens) -> None:
    """Each response in the conversation is exactly what the masks of the sequences hold, in order."""
    sampled = [s.token_ids[s.loss_mask] for s in rollout.sequences]
    ends = np.cumsum([turn.tokens for turn in rollout.turns])
    parts = np.split(np.concatenate(sampled), ends[:-1])
    assert sum(map(len, sampled)) == ends[-1]
    for part, turn in zip(parts, rollout.turns, strict=True):
        assert rollout.messages[turn.message]["role"] == "assistant"
        assert tokenizer.decode(part, skip_special_tokens=True) == rollout.messages[turn.message]["content"]


@pytest.mark.parametrize(("kind", "count"), [("turns", 3), ("async_turns", 2), ("stream", 2)])
def test_a_conversation_is_one_sequence_of_the_tokens_sampled(done, tokenizer, kind, count) -> None:
    rollout = done[kind]
    (sequence,) = rollout.sequences
    assert len(rollout.turns) == count and rollout.finish_reason == "stop"
    whole = tokenizer.apply_chat_template(list(rollout.messages), return_dict=False)
    assert sequence.token_ids.tolist() == whole
    check_masks(tokenizer, rollout)
    assert tokenizer.decode(rollout.response_ids, skip_special_tokens=True) == rollout.messages[-1]["content"]


def test_what_an_agent_returns_is_its_outcome(done) -> None:
    outcome = done["turns"].outcome
    assert isinstance(outcome, Scored) and outcome.score == 0.5
    assert outcome.components == {"length": 7.0, "usage": float(len(done["turns"].sequences[0].token_ids))}
    assert outcome.info["seen"][:-1] == [message["content"] for message in done["turns"].messages]
    assert done["async_turns"].outcome == Scored(1.0)
    assert done["nothing"].outcome is None and done["stream"].outcome is None


def test_other_conversations_are_further_sequences(done, tokenizer) -> None:
    rollout = done["several"]
    assert len(rollout.sequences) == 5 and len(rollout.turns) == 6
    check_masks(tokenizer, rollout)
    assert [len(np.flatnonzero(np.diff(s.loss_mask.astype(int)) == 1)) for s in rollout.sequences] == [
        1,
        1,
        1,
        2,
        1,
    ]
    last = rollout.sequences[-1]
    assert tokenizer.decode(last.token_ids[:-1]) == "abc" and last.trained == 1
    assert rollout.outcome.info == {"text": tokenizer.decode(last.token_ids[-1:]), "reason": "length"}


def test_conversations_may_be_held_at_the_same_time(done, tokenizer) -> None:
    rollout = done["parallel"]
    assert len(rollout.sequences) == 24 and len(rollout.turns) == 48 and rollout.outcome is None
    begun = {tokenizer.decode(s.token_ids).partition("<end>")[0] for s in rollout.sequences}
    assert begun == {f"<user>number {number}" for number in range(24)}
    check_masks(tokenizer, rollout)


def test_a_stream_that_is_left_is_a_response_all_the_same(done, tokenizer) -> None:
    rollout = done["left_stream"]
    assert len(rollout.sequences) == 2 and len(rollout.turns) == 3 and rollout.outcome is None
    check_masks(tokenizer, rollout)


def test_a_rewritten_conversation_is_a_further_sequence(done, tokenizer) -> None:
    rollout = done["rewrites"]
    _, second = rollout.sequences
    check_masks(tokenizer, rollout)
    kept = rollout.messages[3]["content"]
    text = tokenizer.decode(second.token_ids)
    assert text.startswith(f"<user>say<end><user>in short: <end><end><assistant>{kept}<end><user>on<end>")
    # A control token that is only spelled out is text, and what was sampled before is not trained on again.
    spelled = second.token_ids[: int(np.argmax(second.loss_mask))].tolist()
    assert spelled.count(tokenizer.eos_token_id) == 4 and len(rollout.turns) == 4


@pytest.mark.parametrize(("kind", "conversations"), [("tools", 2), ("streamed_tools", 1)])
def test_calls_of_tools_are_read_and_stay_as_they_were_sampled(
    roll_out, tokenizer, kind, conversations
) -> None:
    (rollout,) = roll_out([{"kind": kind}], CallingEngine(tokenizer))
    assert rollout.outcome is None, rollout.outcome
    assert len(rollout.sequences) == conversations
    first = rollout.sequences[0]
    text = tokenizer.decode(first.token_ids)
    assert text == f"<user>say<end><assistant>{CALL}<end><tool>2<end><assistant>fine<end>"
    assert tokenizer.decode(first.token_ids[first.loss_mask]) == f"{CALL}<end>fine<end>"
    (call,) = rollout.messages[1]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 1}}


def test_a_request_that_is_given_up_leaves_nothing_and_may_be_made_again(roll_out, tokenizer) -> None:
    engine = StuckEngine(tokenizer)
    (rollout,) = roll_out([{"kind": "impatient"}], engine, timeout=120.0)
    assert isinstance(rollout.outcome, Scored), rollout.outcome
    assert rollout.outcome.components["given_up"] >= 2 and engine.forgotten >= 2
    (sequence,) = rollout.sequences
    assert len(rollout.turns) == 2
    assert sequence.token_ids.tolist() == tokenizer.apply_chat_template(
        list(rollout.messages), return_dict=False
    )
    check_masks(tokenizer, rollout)


def test_errors_are_told_in_the_form_of_the_api(done) -> None:
    unsupported = "unsupported_parameter"
    assert done["errors"].outcome.info == {
        "stop": unsupported,
        "format": unsupported,
        "choice": unsupported,
        "n": "n: Input should be g",
        "max_tokens": "max_tokens: Input sh",
        "role": "messages[0] has the ",
        "image": "messages[0] has an i",
        "last": "The last message is ",
        "arguments": "messages[0] has tool",
        "long": "context_length_exceeded",
        "AuthenticationError": "invalid_api_key",
        "NotFoundError": "rollout_ended",
    }
    assert len(done["errors"].turns) == 1


def test_requests_that_make_no_sense_are_refused_and_others_answered(done, tokenizer) -> None:
    bad = (
        "no JSON",
        "no object",
        "no messages",
        "no message",
        "deep",
        "half a character",
        "bytes",
        "nothing",
        "content",
        "many",
        "unknown token",
    )
    assert isinstance(done["sloppy"].outcome, Scored), done["sloppy"].outcome
    assert done["sloppy"].outcome.info["info"] == {
        **dict.fromkeys(bad, 400),
        "path": 404,
        "large": 413,
        "fine": 200,
        "more": 200,
    }
    assert len(done["sloppy"].sequences) == 1 and len(done["sloppy"].turns) == 2
    check_masks(tokenizer, done["sloppy"])


@pytest.mark.parametrize(
    ("kind", "text", "turns"),
    [
        ("crash", "in crash: raise ZeroDivisionError", 1),
        ("dies", "agent ended its process (signal 9, SIGKILL)", 0),
        ("silent", "without a response", 0),
        ("garbage", "returned the reward 'good' of type str", 1),
    ],
)
def test_what_breaks_is_a_failure_of_its_rollout(done, kind, text, turns) -> None:
    outcome = done[kind].outcome
    assert isinstance(outcome, Failed) and outcome.kind == "environment" and text in outcome.detail
    assert len(done[kind].turns) == turns


def test_nothing_is_left_running(done) -> None:
    begun = [line.split() for line in done["output"].splitlines() if line.startswith("begun ")]
    assert {line[1] for line in begun} == {*KINDS, "sleep"}
    assert not any(is_running(int(line[2])) for line in begun)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_agent_that_hangs_is_ended(roll_out) -> None:
    hangs, fine = roll_out([{"kind": "hangs"}, {"kind": "turns"}], timeout=4.0)
    assert isinstance(fine.outcome, Scored)
    assert isinstance(hangs.outcome, Failed) and "agent took longer than 4 s" in hangs.outcome.detail
    assert "begun hangs" in roll_out.output


def test_the_same_rollouts_again_have_the_same_bits(roll_out, tokenizer) -> None:
    infos = [{"kind": kind} for kind in ("turns", "several", "rewrites", "stream", "async_turns")]
    engines = ScriptedEngine(tokenizer), ScriptedEngine(tokenizer)
    first, second = (roll_out(infos, engine, in_lockstep=True) for engine in engines)
    assert engines[0].steps == engines[1].steps
    for one, other in zip(first, second, strict=True):
        assert (one.messages, one.turns, one.outcome) == (other.messages, other.turns, other.outcome)
        for mine, its in zip(one.sequences, other.sequences, strict=True):
            assert mine.token_ids.tobytes() == its.token_ids.tobytes()
            assert mine.loss_mask.tobytes() == its.loss_mask.tobytes()
            assert mine.log_probs.tobytes() == its.log_probs.tobytes()


def test_a_fault_of_the_engine_ends_the_run(roll_out, tokenizer) -> None:
    with pytest.raises(RuntimeError, match="no weights"):
        roll_out([{"kind": "turns"}], BrokenEngine(tokenizer))


def test_a_file_that_cannot_be_imported_ends_the_run(roll_out) -> None:
    with pytest.raises(ConfigError, match="NoSuchPackage"):
        roll_out([{}], code="import NoSuchPackage\n\n\ndef agent(base_url, api_key, row):\n    pass\n")


COMMAND = """
import json, os, sys, urllib.request
row = json.load(open(os.environ["IIVERL_ROW"]))
print("row of", row["ground_truth"])
body = json.dumps({"messages": row["prompt"]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
answer = json.load(urllib.request.urlopen(urllib.request.Request(url, body, headers)))
if row["extra_info"]["code"]:
    print("no luck", file=sys.stderr)
    sys.exit(row["extra_info"]["code"])
if row["extra_info"]["writes"]:
    json.dump({"reward": 3, "said": answer["choices"][0]["message"]["content"]}, open(os.environ["IIVERL_RESULT"], "w"))
"""


def test_an_agent_may_be_a_command(roll_out, tokenizer, tmp_path) -> None:
    (tmp_path / "program.py").write_text(COMMAND)
    infos = [{"code": code, "writes": writes} for code, writes in ((0, True), (0, False), (3, True))]
    first, second, third = roll_out(infos, command=f"{sys.executable} {tmp_path / 'program.py'}")
    assert first.outcome == Scored(3.0, {}, {"said": first.messages[-1]["content"]})
    assert second.outcome is None and len(second.turns) == 1
    assert isinstance(third.outcome, Failed) and third.outcome.detail.endswith(
        "ended with exit code 3\nno luck"
    )
    assert roll_out.output.count("no luck\n") == 1
    assert roll_out.output.count("row of truth\n") == 3
    for rollout in (first, second):
        check_masks(tokenizer, rollout)


LIGHT = """
import http.client, json
from urllib.parse import urlsplit


def agent(base_url, api_key, row):
    url, messages = urlsplit(base_url), list(row["prompt"])
    connection = http.client.HTTPConnection(url.hostname, url.port)
    for turn in range(4):
        body = json.dumps({"messages": messages, "max_tokens": 8})
        connection.request("POST", url.path + "/chat/completions", body, {"Authorization": "Bearer " + api_key})
        response = connection.getresponse()
        assert response.status == 200
        said = json.loads(response.read())["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": f"turn {turn}"}]
    return 1.0
"""


@pytest.mark.slow
@pytest.mark.alone
def test_64_agents_at_once_with_a_model(roll_out, make_model, make_engine_of, tiny_tokenizer) -> None:
    """Each in a process of its own; the log-probs are those of the model over the sequences as they are trained."""
    path, model = make_model("qwen2")
    engine = make_engine_of(path, model)
    rollouts = roll_out([{}] * 64, engine, tokens=tiny_tokenizer, code=LIGHT, workers=64)
    assert all(rollout.outcome == Scored(1.0) and len(rollout.turns) == 4 for rollout in rollouts)
    for rollout in rollouts[::8]:
        for sequence in rollout.sequences:
            expected = log_probs(model, sequence)
            assert np.allclose(sequence.log_probs[sequence.loss_mask], expected, atol=1e-4)


def log_probs(model: Any, sequence: TokenSequence) -> np.ndarray:
    """Compute the log-probs of the sampled tokens, teacher-forced."""
    ids = torch.from_numpy(sequence.token_ids)
    with torch.no_grad():
        every = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
    at = np.flatnonzero(sequence.loss_mask)
    return every[at - 1, ids[at]].numpy()
