"""Chats in the forms in which files hold them, and the special tokens at both ends of a prompt."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from iiverl_core.data import DataError, load_prompts, turn_end
from iiverl_core.samples import Prompt

USER = [{"role": "user", "content": "2+3?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>' if enable_thinking else '' }}{% endif %}"
)
OPENED = "<|im_start|>assistant\n"

Copy = Callable[..., PreTrainedTokenizerFast]
Read = Callable[..., list[Prompt]]


@pytest.fixture
def copy(tiny_tokenizer: PreTrainedTokenizerFast) -> Copy:
    """Make a tokenizer that puts `before` and `after` around texts."""

    def make(before: str = "", after: str = "", template: str = TEMPLATE) -> PreTrainedTokenizerFast:
        backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
        new = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|bos|>",
            eos_token=tiny_tokenizer.eos_token,
            chat_template=template,
        )
        added = [(token, new.convert_tokens_to_ids(token)) for token in (before, after) if token]
        if added:
            new.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{before} $A {after}".strip(), special_tokens=added
            )
        return new

    return make


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write rows to a file and load them; what is printed is in `read.said`."""

    def _read(
        rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, kind: str = "jsonl", **more: Any
    ):
        path = tmp_path / f"rows.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        console = Console(file=io.StringIO(), width=400)
        prompts = list(
            load_prompts(
                str(path),
                "train",
                tokenizer,
                max_prompt_length=512,
                tools_key="tools",
                console=console,
                **more,
            )
        )
        _read.said = console.file.getvalue()  # type: ignore[attr-defined]
        return prompts

    return _read


def test_an_end_of_sentence_token_that_the_tokenizer_appends_is_removed(copy: Copy, read: Read) -> None:
    """With it, the response would be over before it begins."""
    tokenizer = copy("<|bos|>", "<|im_end|>")
    rows = [{"prompt": "a"}, {"prompt": "<|bos|>b"}, {"prompt": USER}, {"prompt": "c<|im_end|>"}]
    prompts = read(rows, tokenizer)
    assert [each.text for each in prompts] == [
        "<|bos|>a", "<|bos|>b", f"<|im_start|>user\n2+3?<|im_end|>\n{OPENED}", "<|bos|>c<|im_end|>"
    ]  # fmt: skip
    assert read.said.count("end-of-sentence token '<|im_end|>'") == 1  # type: ignore[attr-defined]
    assert "3 prompts ended" in read.said  # type: ignore[attr-defined]


def test_a_chat_that_ends_with_such_a_token_is_reported_and_kept(copy: Copy, read: Read) -> None:
    """The template may end every turn with it, and start none."""
    (prompt,) = read([{"prompt": USER}], copy(template="{{ messages[0].content }}<|im_end|>"))
    assert prompt.text == "2+3?<|im_end|>"
    assert "1 prompt ended" in read.said  # type: ignore[attr-defined]


def test_the_first_token_comes_once_in_a_chat_too(copy: Copy, read: Read) -> None:
    (prompt,) = read([{"prompt": USER}], copy(template="<|bos|><|bos|>{{ messages[0].content }}"))
    assert prompt.text == "<|bos|>2+3?"


def test_a_token_that_the_model_does_not_know_is_named_with_its_row(copy: Copy, read: Read) -> None:
    tokenizer = copy()
    tokenizer.add_tokens(["<new>"])
    rows, known = [{"prompt": "a"}, {"prompt": "b <new> c"}], len(tokenizer) - 1
    with pytest.raises(DataError, match=rf"rows.jsonl, row 1 .*token '<new>' with id \d+, .*below {known}"):
        read(rows, tokenizer, vocabulary=known)
    assert len(read(rows, tokenizer, vocabulary=known + 1)) == 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_chat_may_be_stored_as_json(copy: Copy, read: Read, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": json.dumps(USER)},
        {"prompt": "[1] is a citation"},
        {"prompt": "[1, 2]"},
    ]
    chat, *texts = read(rows, copy(), kind)
    assert chat.text == f"<|im_start|>user\n2+3?<|im_end|>\n{OPENED}"
    assert chat.chat == tuple(USER)
    assert [(each.text, each.chat) for each in texts] == [("[1] is a citation", None), ("[1, 2]", None)]


def test_nulls_of_other_rows_are_in_no_message(copy: Copy, read: Read) -> None:
    """Parquet gives every struct the fields of all."""

    def asking(arguments: dict[str, str]) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [
            *USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x"},
        ]

    rows = [{"prompt": asking({"city": "Rome"})}, {"prompt": asking({"ticker": "X"})}]
    first, second = read(rows, copy(), "parquet")
    assert '({"city": "Rome"})' in first.text and '({"ticker": "X"})' in second.text
    rows[0]["prompt"][1]["content"] = None  # a message of calls alone
    assert read(rows, copy(), "parquet")[0].text == first.text


@pytest.mark.parametrize("as_text", [False, True])
def test_the_tools_of_a_row_are_shown_to_the_template(copy: Copy, read: Read, as_text: bool) -> None:
    other = {"type": "function", "function": {"name": "stocks", "parameters": {"ticker": {"type": "string"}}}}
    tools = [[TOOL], [other], None]
    rows = [{"prompt": USER, "tools": json.dumps(each) if as_text and each else each} for each in tools]
    first, second, third = read(rows, copy(), "parquet")
    shown = (
        json.JSONDecoder().raw_decode(first.text[1:])[0],
        json.JSONDecoder().raw_decode(second.text[1:])[0],
    )
    assert shown == (TOOL, other)
    assert third.text == f"<|im_start|>user\n2+3?<|im_end|>\n{OPENED}"
    with pytest.raises(DataError, match=r"row 0 .*data.tools_key"):
        read([{"prompt": USER, "tools": ["hammer"]}], copy())


def test_a_response_continues_an_assistants_message_at_the_end(copy: Copy, read: Read) -> None:
    (prompt,) = read([{"prompt": [*USER, {"role": "assistant", "content": "It is"}]}], copy())
    assert prompt.text == f"<|im_start|>user\n2+3?<|im_end|>\n{OPENED}It is"


def test_variables_of_the_template_can_be_set(copy: Copy, read: Read) -> None:
    (prompt,) = read([{"prompt": USER}], copy(), template_kwargs={"enable_thinking": True})
    assert prompt.text.endswith(f"{OPENED}<think>")


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"prompt": "half \ud83d"}, TEMPLATE, "lone surrogate U[+]D83D"),
        ({"prompt": [{"role": "user", "content": "half \ude00"}]}, TEMPLATE, "lone surrogate U[+]DE00"),
        ({"prompt": USER}, "{{ 1 / (messages | length - 1) }}", "rejects: ZeroDivisionError"),
        ({"prompt": USER}, "{{ messages[0].content.no_such() }}", "rejects: .*no_such"),
        ({"prompt": USER}, "{{ messages[0]['content'][9].x.y }}", "rejects"),
    ],
)
def test_what_cannot_be_rendered_names_its_row(
    copy: Copy, read: Read, row: dict[str, Any], template: str, message: str
) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl, row 1 .*{message}"):
        read([{"prompt": "fine"}, row], copy(template=template))


def test_the_token_that_ends_a_turn(copy: Copy) -> None:
    assert turn_end(copy()) == copy().convert_tokens_to_ids("<|im_end|>")
    assert turn_end(copy(template="{{ messages[-1].content }} and no more")) is None
    assert turn_end(copy(template="{{ 1 / 0 }}")) is None
