"""Whole conversations in the tokens of a reward model, against transformers by hand."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.reward_tokenizer import reward_tokenizer
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.data import ConversationWriter, load_conversation_writer
from iiverl_core.data.chat import PromptError
from iiverl_core.errors import ConfigError
from iiverl_core.samples import Prompt

CHAT = ({"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"})
ANSWERED = [*CHAT, {"role": "assistant", "content": "5"}]
TOKENIZER = reward_tokenizer()


def chat_prompt(*messages: dict[str, Any]) -> Prompt:
    return Prompt(row=0, ids=(1, 2, 3), text="<|im_start|>…", chat=messages or CHAT)


def by_hand(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return list(tokenizer.apply_chat_template(ANSWERED, tokenize=True, return_dict=False))


def test_each_model_reads_the_conversation_through_its_own_template(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    own = ConversationWriter(TOKENIZER).ids(chat_prompt(), "5")
    assert own == by_hand(TOKENIZER)
    assert TOKENIZER.decode(own) == "<s>[system] Add. [user] 2+3? [assistant] 5</s> "  # one <s>, one answer
    policys = ConversationWriter(tiny_tokenizer).ids(chat_prompt(), "5")
    assert policys == by_hand(tiny_tokenizer)
    assert set(own) != set(policys)


def test_the_prompt_is_left_as_it_was() -> None:
    prompt = chat_prompt()
    ConversationWriter(TOKENIZER).ids(prompt, "5")
    assert prompt.chat == CHAT


def test_a_plain_prompt_is_followed_by_its_response() -> None:
    writer = ConversationWriter(TOKENIZER)
    ids = writer.ids(Prompt(row=0, ids=(1,), text="2+3="), "5")
    assert ids == TOKENIZER("2+3=5")["input_ids"]
    assert TOKENIZER.decode(ids) == "<s>2+3=5"
    assert writer.ids(Prompt(row=0, ids=(1,), text="<s>2+3="), "5") == ids  # the same token, once


def test_the_first_token_of_another_tokenizer_is_not_read_as_text() -> None:
    writer = ConversationWriter(TOKENIZER, written_bos="<|bos|>")
    assert TOKENIZER.decode(writer.ids(Prompt(row=0, ids=(1,), text="<|bos|>2+3="), "5")) == "<s>2+3=5"


@given(st.text(max_size=30), st.text(max_size=30), st.integers(1, 40))
def test_truncation_keeps_the_named_part(question: str, answer: str, limit: int) -> None:
    prompt = chat_prompt({"role": "user", "content": question})
    whole = ConversationWriter(TOKENIZER).ids(prompt, answer)
    right = ConversationWriter(TOKENIZER, max_length=limit, truncation="right").ids(prompt, answer)
    left = ConversationWriter(TOKENIZER, max_length=limit, truncation="left").ids(prompt, answer)
    assert len(left) == len(right) == min(limit, len(whole))
    assert whole[: len(right)] == right
    assert whole[len(whole) - len(left) :] == left


def test_a_conversation_that_may_not_be_cut_is_refused() -> None:
    length = len(by_hand(TOKENIZER))
    fits = ConversationWriter(TOKENIZER, max_length=length, truncation="error")
    assert len(fits.ids(chat_prompt(), "5")) == length
    with pytest.raises(PromptError, match=rf"are {length + 1} tokens .*max_length is {length}; raise it"):
        fits.ids(chat_prompt(), "55")


def test_a_chat_that_the_template_refuses_or_drops_is_told() -> None:
    tokenizer = reward_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(PromptError, match="rejects: no system"):
        ConversationWriter(tokenizer).ids(chat_prompt(), "5")
    tokenizer.chat_template = "{% if false %}x{% endif %}"
    with pytest.raises(PromptError, match="without tokens"):
        ConversationWriter(tokenizer).ids(chat_prompt(), "5")


def test_chats_need_a_template_and_strings_do_not() -> None:
    tokenizer = reward_tokenizer()
    tokenizer.chat_template = None
    writer = ConversationWriter(tokenizer)
    assert writer.ids(Prompt(row=0, ids=(1,), text="2+3="), "5")
    with pytest.raises(
        ConfigError,
        match=r"^reward_model\.model\.path: .* has no chat template(.|\n)*input_tokenizer to null",
    ):
        writer.ids(chat_prompt(), "5")


def config(policy: Path, model: Path, *, input_tokenizer: bool = True, **reward_model: Any) -> RunConfig:
    tokenizer = {} if input_tokenizer else {"input_tokenizer": None}
    values = {
        "actor_rollout_ref": {"model": {"path": str(policy)}},
        "data": {"max_prompt_length": 6, "max_response_length": 4},
        "reward_model": {"enable": True, "model": {"path": str(model), **tokenizer}, **reward_model},
    }
    return run_config(build(values))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the reward model's tokenizer."""
    reward_tokenizer().save_pretrained(tmp_path / "reward-model")
    return tmp_path / "reward-model"


def test_the_configuration_names_tokenizer_and_bounds(tiny_model_path: Path, model: Path) -> None:
    writer = load_conversation_writer(config(tiny_model_path, model))
    assert writer is not None
    assert writer.ids(chat_prompt(), "5") == by_hand(TOKENIZER)
    writer = load_conversation_writer(config(tiny_model_path, model, max_length=9, truncation="left"))
    assert writer is not None
    assert writer.ids(chat_prompt(), "5") == by_hand(TOKENIZER)[-9:]


def test_a_prompt_written_with_the_models_own_first_token_has_it_once(
    tiny_model_path: Path, model: Path
) -> None:
    writer = load_conversation_writer(config(model, model))
    assert writer is not None
    assert TOKENIZER.decode(writer.ids(Prompt(row=0, ids=(1,), text="<s>2+3="), "5")) == "<s>2+3=5"


def test_without_a_tokenizer_of_its_own_nothing_is_written_anew(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    for bounds in ({}, {"max_length": 10}):
        given = config(tiny_model_path, nothing, input_tokenizer=False, **bounds)
        assert load_conversation_writer(given) is None
    with pytest.raises(ConfigError, match=r"max_length is 9, .* up to 10 tokens"):
        load_conversation_writer(config(tiny_model_path, nothing, input_tokenizer=False, max_length=9))


def test_a_reward_model_without_a_tokenizer_names_the_key(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^reward_model\.model\.path: there is no folder /"):
        load_conversation_writer(config(tiny_model_path, tmp_path / "nothing"))
