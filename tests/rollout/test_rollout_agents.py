"""Agents: what programs ask by the OpenAI API is trained on as it was sampled, and what they break is one rollout's."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from iiverl_core.config import build, run_config
from iiverl_core.rollout import RolloutTokens, SamplingParams, run_rollouts
from iiverl_core.rollout.agents import OUTPUT, AgentRollouter
from iiverl_reward_client import Failed, Scored
from rollout.scripted import ScriptedEngine, make_tokenizer, requests_of

# One function for all, so that processes import the client once.
AGENT = """
import asyncio, json, os, sys, time
import openai


def agent(base_url, api_key, row):
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    kind = row["extra_info"]["kind"]
    print("begun", kind, flush=True)
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
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as other:
        messages = list(row["prompt"])
        for _ in range(2):
            done = await other.chat.completions.create(model="m", messages=messages)
            messages += [{"role": "assistant", "content": done.choices[0].message.content}, {"role": "user", "content": "on"}]
    return 1


def stream(client, row):
    messages = list(row["prompt"])
    for _ in range(2):
        text, chunks = "", list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
        for chunk in chunks[:-1]:
            text += chunk.choices[0].delta.content or ""
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == len(text) + 1
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": [{"type": "text", "text": "on"}]}]


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


def errors(client, row):
    assert [m.id for m in client.models.list()] == ["policy"]
    seen = {}
    for name, more in {
        "stop": {"stop": ["x"]},
        "format": {"response_format": {"type": "json_object"}},
        "n": {"n": 0},
        "role": {"messages": [{"role": "narrator", "content": "x"}]},
        "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "last": {"messages": [{"role": "assistant", "content": "x"}]},
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


def garbage(client, row):
    ask(client, row["prompt"])
    return "good"


def nothing(client, row):
    ask(client, row["prompt"])
"""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def roll_out(tokenizer, tmp_path_factory) -> Callable[..., list[RolloutTokens]]:
    """Make the rollouts of rows with an agent, in the order of the rows, and close all."""

    def make(
        infos: Sequence[Any], engine: Any = None, tokens: Any = None, **section: Any
    ) -> list[RolloutTokens]:
        folder = tmp_path_factory.mktemp("agents")
        if "command" not in section:
            (folder / "agents.py").write_text(section.pop("code", AGENT))
            section["path"] = str(folder / "agents.py")
        rollout = {
            "name": "hf",
            "agent": {"default_agent_loop": "agent"},
            "multi_turn": {"agent": {"workers": 3, **section}},
        }
        data = {"max_prompt_length": 64, "max_response_length": 128}
        trainer = {"default_local_dir": str(folder)}
        run = run_config(build({"actor_rollout_ref": {"rollout": rollout}, "data": data, "trainer": trainer}))
        rollouter = AgentRollouter(run, tokens or tokenizer)
        engine = engine or ScriptedEngine(tokenizer)
        try:
            asked = requests_of(tokens or tokenizer, infos)
            done = list(run_rollouts(engine, rollouter, asked, SamplingParams(max_tokens=64)))
            assert engine.pending == 0
        finally:
            rollouter.close()
        make.output = (folder / OUTPUT).read_text()
        return sorted(done, key=lambda each: each.id)

    return make


@pytest.fixture(scope="module")
def done(roll_out) -> dict[str, RolloutTokens]:
    """A rollout of each kind."""
    kinds = (
        "turns",
        "async_turns",
        "stream",
        "several",
        "errors",
        "crash",
        "dies",
        "silent",
        "garbage",
        "nothing",
    )
    rollouts = roll_out([{"kind": kind} for kind in kinds])
    return dict(zip(kinds, rollouts, strict=True))


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


def test_errors_are_told_in_the_form_of_the_api(done) -> None:
    unsupported = "unsupported_parameter"
    assert done["errors"].outcome.info == {
        "stop": unsupported,
        "format": unsupported,
        "n": "n: Input should be g",
        "role": "messages[0] has the ",
        "image": "messages[0] has cont",
        "last": "The last message is ",
        "long": "context_length_exceeded",
        "AuthenticationError": "invalid_api_key",
        "NotFoundError": "rollout_ended",
    }
    assert done["errors"].finish_reason == "length" and len(done["errors"].turns) == 1


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


def test_an_agent_that_hangs_is_ended(roll_out) -> None:
    hangs, fine = roll_out([{"kind": "hangs"}, {"kind": "turns"}], timeout=8.0)
    assert isinstance(fine.outcome, Scored)
    assert isinstance(hangs.outcome, Failed) and "agent took longer than 8 s" in hangs.outcome.detail
    assert "begun hangs\n" in roll_out.output


COMMAND = """
import json, os, sys, urllib.request
row = json.load(open(os.environ["IIVERL_ROW"]))
print("row of", row["ground_truth"])
body = json.dumps({"messages": row["prompt"]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
answer = json.load(urllib.request.urlopen(urllib.request.Request(url, body, headers)))
if row["extra_info"]["code"]:
    sys.exit(row["extra_info"]["code"])
if row["extra_info"]["writes"]:
    json.dump({"reward": 3, "said": answer["choices"][0]["message"]["content"]}, open(os.environ["IIVERL_RESULT"], "w"))
"""


def test_an_agent_may_be_a_command(roll_out, tokenizer, tmp_path) -> None:
    import sys

    (tmp_path / "program.py").write_text(COMMAND)
    infos = [{"code": code, "writes": writes} for code, writes in ((0, True), (0, False), (3, True))]
    first, second, third = roll_out(infos, command=f"{sys.executable} {tmp_path / 'program.py'}")
    assert first.outcome == Scored(3.0, {}, {"said": first.messages[-1]["content"]})
    assert second.outcome is None and len(second.turns) == 1
    assert isinstance(third.outcome, Failed) and third.outcome.detail.endswith("ended with exit code 3")
    assert roll_out.output.count("row of truth\n") == 3
    for rollout in (first, second):
        check_masks(tokenizer, rollout)
