"""Formats of tool calls: what models write is read, and nothing that they write raises."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.rollout.tool_calls import BadCall, ToolCall, gpt_oss, hermes, llama3_json, mistral

FORMATS = {"hermes": hermes, "llama3_json": llama3_json, "mistral": mistral, "gpt-oss": gpt_oss}
CALLS = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>',
    "llama3_json": '{"name": "add", "parameters": %s}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": %s}]',
    "gpt-oss": "<|channel|>commentary to=functions.add <|constrain|>json<|message|>%s",
}
PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[", "]", "{", "}",
    "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>", "assistant", "analysis", "commentary",
    " to=functions.add", '"name"', '"arguments"', '"parameters"', ": ", ", ", '"add"', "NaN", "1e999", '"\\ud800"', "5" * 50,
    "[" * 3000, "\n", "é", ";", "\\", '{"name": "add", "arguments": {"a": 1}}',
]  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(), json_values, max_size=4)


@pytest.mark.parametrize("name", FORMATS)
@given(
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12), before=st.integers(0, 10**6)
)
def test_nothing_that_a_model_writes_raises(name: str, pieces: list[str], before: int) -> None:
    """A response is a message of the assistant with text; its calls are named, or say what is wrong with them."""
    response = FORMATS[name]("".join(pieces), before)
    assert response.message["role"] == "assistant"
    assert isinstance(response.message["content"], str)
    for call in response.calls:
        if isinstance(call, ToolCall):
            assert call.name and isinstance(call.arguments, Mapping) and len(call.id) >= 9
            json.dumps(call.arguments, ensure_ascii=False).encode()  # can be sent and rendered
        else:
            assert call.reason
    if any(isinstance(call, BadCall) for call in response.calls):
        assert "tool_calls" not in response.message


@pytest.mark.parametrize("name", FORMATS)
@given(arguments=arguments)
def test_arguments_are_read_as_they_were_written(name: str, arguments: dict) -> None:
    response = FORMATS[name](CALLS[name] % json.dumps(arguments), 7)
    assert response.calls == (ToolCall("call00007", "add", arguments),)
    (call,) = response.message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": arguments}
    assert response.message["content"] == ""


@pytest.mark.parametrize("name", FORMATS)
def test_a_malformed_call_says_what_is_wrong_and_stays_text(name: str) -> None:
    for broken in ('{"a": 1', "{'a': 1}", "[1]", "NaN", '{"a": "\\ud800"}', ""):
        response = FORMATS[name](CALLS[name] % broken, 0)
        (call,) = response.calls
        assert isinstance(call, BadCall), broken
        assert "tool_calls" not in response.message
        assert broken in response.message["content"]


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<[{")))
def test_a_text_without_calls_is_the_message(name: str, text: str) -> None:
    response = FORMATS[name](text, 0)
    assert response.calls == ()
    assert response.message["content"].strip() == text.strip()


def test_several_calls_and_the_text_before_them() -> None:
    add = '{"name": "add", "arguments": {"a": %d}}'
    written = {
        "hermes": f"Let me see.\n<tool_call>{add % 1}</tool_call>\n<tool_call>{add % 2}</tool_call>",
        "mistral": f"Let me see.[TOOL_CALLS][{add % 1}, {add % 2}]",
        "gpt-oss": "<|channel|>commentary<|message|>Let me see.<|end|>"
        + "<|end|>".join(f"<|start|>assistant {CALLS['gpt-oss']}" % f'{{"a": {a}}}' for a in (1, 2)),
    }
    for name, text in written.items():
        response = FORMATS[name](text, 3)
        assert response.message["content"] == "Let me see."
        assert response.calls == (
            ToolCall("call00003", "add", {"a": 1}),
            ToolCall("call00004", "add", {"a": 2}),
        )
    text = " ; ".join((add % a).replace("arguments", "parameters") for a in (1, 2))
    assert [
        call.arguments for call in llama3_json(f"<|python_tag|>{text}", 0).calls if isinstance(call, ToolCall)
    ] == [
        {"a": 1},
        {"a": 2},
    ]


def test_a_call_in_reasoning_is_none() -> None:
    call = CALLS["hermes"] % "{}"
    assert hermes(f"<think>{call}", 0).calls == ()
    assert hermes(f"<think>{call}</think>\n5", 0).calls == ()
    (only,) = hermes(f"<think>{call}</think>\n{call}", 0).calls
    assert isinstance(only, ToolCall)


def test_channels_of_harmony_become_fields() -> None:
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>5"
    assert gpt_oss(text, 0).message == {"role": "assistant", "content": "5", "thinking": "hm"}


def test_a_call_of_mistral_s_newer_format_and_its_own_id() -> None:
    (call,) = mistral('[TOOL_CALLS]add[ARGS]{"a": 1}', 0).calls
    assert call == ToolCall("call00000", "add", {"a": 1})
    (call,) = mistral('[TOOL_CALLS][{"name": "add", "arguments": "{}", "id": "abcDEF123"}]', 0).calls
    assert call == ToolCall("abcDEF123", "add", {})
