"""Conversations as tokens: over chat templates of many kinds, what is trained on is what was sampled."""

import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from iiverl_core.data.chat import PromptError
from iiverl_core.rollout.engine import Completion, GenerationRequest
from iiverl_core.rollout.tool_calls import ToolCall, gpt_oss, hermes, llama3_json, mistral
from iiverl_core.rollout.turns import Conversation, TurnTemplate
from iiverl_core.samples import KEPT_COUNTS, KEPT_IDS, KeptTokens, SampleId
from rollout.chat_templates import KINDS, tokenizer_of

FORMATS = {"llama3": llama3_json, "mistral": mistral, "harmony": gpt_oss}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
USER, SYSTEM = {"role": "user", "content": "What is 2 + 3?"}, {"role": "system", "content": "Be kind."}
REQUEST = GenerationRequest(SampleId("train", 1, 0, 0), (), 0)


def template_of(name: str) -> TurnTemplate:
    return TurnTemplate(tokenizer_of(name), KINDS[name].kwargs)


def encode(name: str, text: str) -> list[int]:
    return tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]


def decode(name: str, ids: Sequence[int] | np.ndarray) -> str:
    return str(tokenizer_of(name).decode(list(ids)))


def token(name: str, text: str) -> int:
    (id,) = encode(name, text)
    return id


def format_of(name: str):
    return FORMATS.get(name, hermes)


def completion(ids: list[int], *, cut: bool = False, kept: KeptTokens | None = None) -> Completion:
    """A response whose log-probs tell its tokens apart."""
    log_probs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    return Completion(REQUEST, np.array(ids, dtype=np.int64), log_probs, "length" if cut else "stop", 0, kept)


def sampled(name: str, text: str, end: str | None = None) -> Completion:
    """A response as the tokenizer writes it; it ends with the template's own end token."""
    return completion(encode(name, text + (end or KINDS[name].ends[0])))


def call_text(name: str, arguments: dict, *, id: str = "abcdefghi", reasoning: str = "") -> str:
    """A call exactly as the template of a kind repeats it."""
    written = json.dumps(arguments)
    if name == "llama3":
        return f'{{"name": "add", "parameters": {written}}}'
    if name == "mistral":
        return f'[TOOL_CALLS] [{{"name": "add", "arguments": {written}, "id": "{id}"}}]'
    if name == "harmony":
        thinking = f"<|channel|>analysis<|message|>{reasoning}<|end|><|start|>assistant" if reasoning else ""
        return f"{thinking} to=functions.add<|channel|>commentary json<|message|>{written}"
    if reasoning:
        start = "" if name == "reasoning" else "<think>\n"
        reasoning = f"{start}{reasoning}\n</think>\n\n"
    return f'{reasoning}<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>'


def respond(conversation: Conversation, name: str, done: Completion) -> list[dict]:
    """Add a response and return the results of its calls."""
    calls = []

    def read(text: str):
        response = format_of(name)(text, len(conversation.messages))
        calls.extend(call for call in response.calls if isinstance(call, ToolCall))
        return response.message

    conversation.add_response(done, read)
    return [{"role": "tool", "name": each.name, "tool_call_id": each.id, "content": "5"} for each in calls]


def any_split(name: str, text: str, source: random.Random) -> list[int]:
    """Tokens of a text that the tokenizer itself would not choose."""
    ids = []
    while text:
        cut = source.randint(1, 6)
        ids += encode(name, text[:cut])
        text = text[cut:]
    return ids


@st.composite
def responses(draw: st.DrawFn, name: str) -> Completion:
    """A response: words or a call, in any tokens, also cut off, empty, with bytes that are no character."""
    kind = KINDS[name]
    source = random.Random(draw(st.integers(0, 2**32)))
    words = draw(
        st.sampled_from(["", "5", " \n5\n ", "the é the\n\n", "user\n", "<|im_end|>", "[INST] \n", "{"])
    )
    reasoning = draw(st.sampled_from(["", "hm\nhm"]))
    think = reasoning and f"<think>\n{reasoning}\n</think>\n\n"
    call = call_text(name, {"a": 2, "b": "é"}, reasoning=reasoning)
    text = draw(st.sampled_from([words, think + words, call, call.replace(" ", ""), call[:-7], call + words]))
    ids = any_split(name, text, source) if draw(st.booleans()) else encode(name, text)
    if draw(st.booleans()):
        ids.insert(source.randint(0, len(ids)), draw(st.integers(0, len(tokenizer_of(name)) - 1)))
    if draw(st.booleans()):
        ids.append(encode(name, "é")[0] if draw(st.booleans()) else 135)
    cut = draw(st.booleans()) and bool(ids)
    end = draw(st.sampled_from(kind.special)) if draw(st.integers(0, 9)) == 0 else kind.ends[0]
    return completion(ids if cut else [*ids, token(name, end)], cut=cut)


def renderings(name: str, conversations: Sequence[Sequence[Mapping]], tools: list[dict]) -> list[str]:
    """What the template makes of conversations, without those that it rejects."""
    kwargs = {**KINDS[name].kwargs, **({"tools": tools} if tools else {})}
    texts = []
    for messages in conversations:
        with suppress(TemplateError):
            render = tokenizer_of(name).apply_chat_template
            texts.append(
                str(
                    render(
                        [dict(each) for each in messages],
                        tokenize=False,
                        add_generation_prompt=True,
                        **kwargs,
                    )
                )
            )
    return texts


def whole(name: str, messages: Sequence[Mapping], tools: list[dict]) -> list[int]:
    (text,) = renderings(name, [messages], tools)
    return encode(name, text)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data())
@settings(max_examples=30)
def test_trained_tokens_are_the_sampled_ones_and_the_rest_is_the_template_s(
    name: str, data: st.DataObject
) -> None:
    template = template_of(name)
    start = [SYSTEM, USER] if data.draw(st.booleans()) else [USER]
    tools = TOOLS if data.draw(st.booleans()) else []
    conversation = Conversation(template, start, tools=tools)
    as_sampled: list[dict] = list(start)
    contents = st.sampled_from(
        ["5", "", " \n", "the\n\nuser\n", "é", '{"a": 1}', "<|im_end|>\n", "</s>[INST]"]
    )
    asked: list[tuple[list[int], list[int]]] = []
    started = 1
    for _ in range(data.draw(st.integers(1, 4))):
        done = data.draw(responses(name))
        ids = done.token_ids.tolist()
        asked.append((list(conversation.ids), ids))
        replies = respond(conversation, name, done) or [{"role": "user", "content": "And?"}]
        replies = [{**each, "content": data.draw(contents)} for each in replies]
        so_far = list(conversation.ids)
        written = decode(name, ids[: len(ids) - (done.finish_reason == "stop")])
        as_sampled += [{"role": "assistant", "content": written}, *replies]
        try:
            continued = conversation.add_messages(replies)
        except PromptError:  # the template cannot go on after such a response
            assert name in {"mistral", "harmony"}
            break
        started += not continued
        texts = renderings(name, [conversation.messages, as_sampled], tools)
        if continued:
            assert conversation.ids[: len(so_far)] == so_far
            end = "" if done.finish_reason == "length" else decode(name, ids[-1:])
            new = end + decode(name, conversation.ids[len(so_far) :])
            assert any(text.endswith(new) for text in texts)
        else:
            assert decode(name, conversation.ids) in texts
    sequences = conversation.sequences
    assert len(sequences) <= started
    # Every response stands once, after the tokens that it was sampled from, and nothing else is trained on.
    spans = {id(sequence): sequence.loss_mask.copy() for sequence in sequences}
    sequence_of = iter(sequences)
    sequence = next(sequence_of)
    for prompt, ids in asked:
        whole = [*prompt, *ids]
        while sequence.token_ids[: len(whole)].tolist() != whole:
            sequence = next(sequence_of)
        span = slice(len(prompt), len(whole))
        assert sequence.loss_mask[span].all()
        assert sequence.log_probs[span].tolist() == [-float(i) for i in range(1, len(ids) + 1)]
        spans[id(sequence)][span] = False
    assert not any(mask.any() for mask in spans.values())
    assert sum(sequence.trained for sequence in sequences) == sum(len(ids) for _, ids in asked)
    assert [turn.tokens for turn in conversation.turns] == [len(ids) for _, ids in asked]
    assert all(conversation.messages[turn.message]["role"] == "assistant" for turn in conversation.turns)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in {"chatml", "qwen3-no-thinking"}])
def test_a_loop_of_calls_is_one_sequence_with_the_tokens_of_the_whole_rendering(name: str) -> None:
    """Three calls, written as the template repeats them: the tokens are those of rendering it all at the end."""
    conversation = Conversation(template_of(name), [USER], tools=TOOLS)
    messages: list[Mapping] = [USER]
    reasoning = "hm" if name in {"qwen3", "reasoning", "harmony"} else ""
    for number in range(3):
        text = call_text(name, {"a": number, "b": 3}, reasoning=reasoning)
        results = respond(conversation, name, sampled(name, text, "<|call|>" if name == "harmony" else None))
        assert conversation.add_messages(results)
        messages += [conversation.messages[-1 - len(results)], *results]
    assert conversation.ids == whole(name, messages, TOOLS)
    assert len(conversation.sequences) == 1


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "llama3", "mistral"])
def test_a_chat_without_reasoning_is_one_sequence(name: str) -> None:
    conversation = Conversation(template_of(name), [SYSTEM, USER] if name != "mistral" else [USER])
    for answer in (" five", " the é\n\nuser\n!", " "):
        conversation.add_response(sampled(name, answer))
        assert conversation.add_messages([{"role": "user", "content": "Sure?"}])
    assert len(conversation.sequences) == 1


def test_a_template_that_knows_no_calls_gets_them_as_text() -> None:
    """Also in the prompt of a further sequence, which begins because the template writes another end than was sampled."""
    conversation = Conversation(template_of("chatml"), [USER], tools=TOOLS)
    text = call_text("chatml", {"a": 1})
    results = respond(conversation, "chatml", sampled("chatml", text, "<|endoftext|>"))
    assert not conversation.add_messages(results)
    as_text = {"role": "assistant", "content": text}
    assert conversation.ids == whole("chatml", [USER, as_text, *results], [])


@pytest.mark.parametrize("name", ["qwen3", "reasoning"])
def test_reasoning_that_the_template_removes_starts_a_sequence(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen3 keeps reasoning while tools answer, and drops it when the user asks again: exactly then a sequence begins."""
    conversation = Conversation(template_of(name), [USER], tools=TOOLS)
    start = "" if name == "reasoning" else "<think>\n"
    with caplog.at_level(logging.WARNING):
        result = respond(conversation, name, sampled(name, call_text(name, {"a": 1}, reasoning="hm")))
        assert conversation.add_messages(result)
        for _ in range(2):
            conversation.add_response(sampled(name, f"{start}so\n</think>\n\n5"))
            assert not conversation.add_messages([{"role": "user", "content": "Sure?"}])
    assert len(caplog.records) == 1
    first, second = conversation.sequences
    assert "hm\n</think>" in decode(name, first.token_ids) and decode(name, first.token_ids).endswith(
        "5<|im_end|>"
    )
    assert (
        "hm\n" not in decode(name, second.token_ids)
        and decode(name, second.token_ids).count("so\n</think>") == 1
    )
    assert conversation.ids == whole(name, conversation.messages, TOOLS)
    assert conversation.messages[-2]["content"].endswith("5")


def test_an_empty_reasoning_that_only_the_prompt_has_starts_a_sequence() -> None:
    name = "qwen3-no-thinking"
    conversation = Conversation(template_of(name), [USER])
    conversation.add_response(sampled(name, "5"))
    assert not conversation.add_messages([{"role": "user", "content": "Sure?"}])
    assert conversation.ids == whole(name, conversation.messages, [])


def test_an_analysis_is_removed_after_the_final_message_and_its_end_is_replaced() -> None:
    conversation = Conversation(template_of("harmony"), [USER])
    final = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>5"
    respond(conversation, "harmony", sampled("harmony", final, "<|return|>"))
    assert not conversation.add_messages([{"role": "user", "content": "Sure?"}])
    text = decode("harmony", conversation.ids)
    assert text.endswith(
        "<|channel|>final<|message|>5<|end|><|start|>user<|message|>Sure?<|end|><|start|>assistant"
    )
    assert "hm" not in text


def test_calls_that_the_template_writes_otherwise_are_repeated_as_they_were_if_it_can() -> None:
    """A call with other spaces is repeated as text; a template that has no such form begins a sequence."""
    for name, kept in (("qwen2.5", True), ("llama3", True), ("mistral", True), ("harmony", False)):
        conversation = Conversation(template_of(name), [USER], tools=TOOLS)
        text = call_text(name, {"a": 1, "b": 2}).replace(", ", ",")
        end = "<|call|>" if name == "harmony" else None
        results = respond(conversation, name, sampled(name, text, end))
        assert results
        assert conversation.add_messages(results) == kept


@pytest.mark.parametrize("name", KINDS)
def test_what_a_tool_prints_never_becomes_a_control_token(name: str) -> None:
    """With every control token in a result, the control tokens are those of a result of one word."""
    kind, tokenizer = KINDS[name], tokenizer_of(name)
    attack = (
        "".join(f"{text}{text[:4]}{text}{text[4:]}" for text in (*kind.special, *kind.added)) + "q7Zx q7Zx1z"
    )
    found = []
    for content in ("5", attack):
        conversation = Conversation(template_of(name), [USER], tools=TOOLS)
        text = call_text(name, {"a": 1})
        results = respond(conversation, name, sampled(name, text, "<|call|>" if name == "harmony" else None))
        conversation.add_messages([{**(results or [{"role": "tool"}])[0], "content": content}])
        conversation.add_response(sampled(name, "x"))
        # and also in the prompt of a further sequence
        conversation.add_messages([{"role": "user", "content": content}])
        for ids in (conversation.ids, *(each.token_ids.tolist() for each in conversation.sequences)):
            found.append([id for id in ids if id in tokenizer.added_tokens_decoder])
        assert content in decode(name, conversation.ids)
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_a_control_token_that_the_policy_spells_out_is_none_when_it_is_written_again() -> None:
    name = "qwen3-no-thinking"  # writes every turn again
    conversation = Conversation(template_of(name), [USER])
    spelled = [token(name, char) for char in "<|im_end|>"]
    end = token(name, "<|im_end|>")
    conversation.add_response(completion([*spelled, end]))
    assert not conversation.add_messages([{"role": "user", "content": "?"}])
    assert conversation.ids.count(end) == 3
    assert "<|im_end|><|im_end|>" in decode(name, conversation.ids)


def test_a_dataset_s_prompt_keeps_its_tokens_and_its_control_tokens() -> None:
    chat = [{"role": "user", "content": "a<|im_start|>b"}]
    ids = whole("chatml", chat, [])
    conversation = Conversation(template_of("chatml"), chat, prompt_ids=ids)
    conversation.add_response(sampled("chatml", "5"))
    assert conversation.add_messages([{"role": "user", "content": "a<|im_start|>b"}])
    start = token("chatml", "<|im_start|>")
    assert conversation.ids[: len(ids)] == ids and conversation.ids.count(start) == ids.count(start) + 2


def test_a_response_that_continues_a_message_is_repeated_with_its_beginning() -> None:
    conversation = Conversation(template_of("qwen2.5"), [USER, {"role": "assistant", "content": "It is"}])
    assert conversation.add_response(sampled("qwen2.5", " 5"))["content"] == "It is 5"
    assert conversation.add_messages(
        [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    )
    conversation.add_response(sampled("qwen2.5", "!"))
    assert conversation.add_messages([{"role": "user", "content": "OK"}])
    assert conversation.ids == whole("qwen2.5", conversation.messages, [])
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2 + ["user"]


def test_a_cut_response_gets_the_template_s_end_which_is_not_trained_on() -> None:
    conversation = Conversation(template_of("qwen2.5"), [USER])
    ids = encode("qwen2.5", "It is")
    conversation.add_response(completion(ids, cut=True))
    assert conversation.add_messages([{"role": "user", "content": "Go on"}])
    conversation.add_response(sampled("qwen2.5", "5"))
    (sequence,) = conversation.sequences
    assert sequence.trained == len(ids) + 2
    messages = [{"role": "assistant", "content": "It is"}, {"role": "user", "content": "Go on"}]
    assert sequence.token_ids[:-2].tolist() == whole("qwen2.5", [USER, *messages], [])


def test_what_top_k_kept_of_several_turns_is_joined() -> None:
    conversation = Conversation(template_of("chatml"), [USER])
    end = token("chatml", "<|im_end|>")
    kept = KeptTokens(np.array([5, 6, end], np.int32), np.array([2, 1], np.int32))
    for _ in range(2):
        conversation.add_response(completion([5, end], kept=kept))
        conversation.add_messages([USER])
    (sequence,) = conversation.sequences
    assert sequence.extras[KEPT_IDS].tolist() == [5, 6, end] * 2
    assert sequence.extras[KEPT_COUNTS].tolist() == [2, 1] * 2


def test_messages_and_responses_alternate() -> None:
    conversation = Conversation(template_of("chatml"), [USER])
    with pytest.raises(RuntimeError):
        conversation.add_messages([USER])
    conversation.add_response(sampled("chatml", "5"))
    with pytest.raises(RuntimeError):
        conversation.add_response(sampled("chatml", "5"))
