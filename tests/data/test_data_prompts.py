"""Rows become prompts."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from iiverl_core.data import DataError, PromptSet, Truncation, load_prompts
from iiverl_core.data.chat import PromptError, as_messages


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Add."}, {"role": "user", "content": text}]


def write(path: Path, prompts: Sequence[Any], **columns: Sequence[Any]) -> str:
    names = ("prompt", *columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(prompts, *columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    files: str | list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_key: str = "prompt",
    limit: int = 512,
    filter_overlong: bool = False,
    truncation: Truncation = "error",
    console: Console | None = None,
    **options: Any,
) -> PromptSet:
    return load_prompts(
        files,
        "train",
        tokenizer,
        prompt_key=prompt_key,
        max_prompt_length=limit,
        filter_overlong=filter_overlong,
        truncation=truncation,
        console=console or Console(file=io.StringIO()),
        **options,
    )


def test_a_chat_goes_through_the_template_up_to_the_answer(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", [chat("2+3?")]), tiny_tokenizer)
    text = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == text
    templated = tiny_tokenizer.apply_chat_template(
        chat("2+3?"), add_generation_prompt=True, return_dict=False
    )
    assert list(prompt.ids) == templated
    assert all(type(i) is int for i in prompt.ids)


def test_a_string_is_taken_as_it_stands(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", ["2+3="]), tiny_tokenizer)
    assert prompt.text == "2+3="
    assert list(prompt.ids) == tiny_tokenizer("2+3=")["input_ids"]


def test_a_tokenizers_first_token_comes_once(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = cast(PreTrainedTokenizerFast, _with_first_token(tiny_tokenizer))
    prompts = ["<|bos|>ready", "plain", chat("x"), "<|bos|>ready"]
    strings = load(write(tmp_path / "a.jsonl", prompts[:2]), tokenizer)
    assert [prompt.text for prompt in strings] == ["<|bos|>ready", "<|bos|>plain"]
    mixed = load(write(tmp_path / "b.jsonl", prompts), tokenizer)
    assert [prompt.text.count("<|bos|>") for prompt in mixed] == [1, 1, 0, 1]


def _with_first_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    copy = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<|bos|>",
        eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", cast(int, copy.bos_token_id))]
    )
    return copy


def test_a_row_of_verl_parquet(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    frame = pd.DataFrame(
        {
            "data_source": ["openai/gsm8k"],
            "prompt": [np.array([{"role": "user", "content": "2+3?"}], dtype=object)],
            "ability": ["math"],
            "reward_model": [{"style": "rule", "ground_truth": "5"}],
            "extra_info": [{"split": "train", "index": 0}],
        }
    )
    frame.to_parquet(tmp_path / "train.parquet")
    prompts = load(str(tmp_path / "train.parquet"), tiny_tokenizer)
    (prompt,) = prompts
    assert (prompt.row, prompt.data_source, prompt.ground_truth) == (0, "openai/gsm8k", "5")
    assert prompt.columns == {
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"split": "train", "index": 0},
    }
    assert prompts.columns == ("data_source", "ability", "reward_model", "extra_info")


def test_a_row_for_the_reward_server(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": chat("2+3?"), "verification_info": '{"answer": {"value": "5"}}'}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (prompt,) = load(str(tmp_path / "a.jsonl"), tiny_tokenizer, prompt_key="messages")
    assert (prompt.data_source, prompt.ground_truth) == ("", None)
    assert prompt.columns == {"verification_info": '{"answer": {"value": "5"}}'}


def test_a_ground_truth_column(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(
        tmp_path / "a.jsonl", ["a", "b"], ground_truth=[5, 0], reward_model=[None, {"ground_truth": "6"}]
    )
    first, second = load(path, tiny_tokenizer)
    assert (first.ground_truth, first.columns) == (5, {"reward_model": None})
    assert (second.ground_truth, second.columns["ground_truth"]) == ("6", 0)


def test_lists_of_structs_as_older_datasets_wrote_them() -> None:
    assert as_messages({"role": ["system", "user"], "content": ["Add.", "1+1"]}) == chat("1+1")


def test_a_chat_is_kept_and_a_string_is_none(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = load(write(tmp_path / "a.jsonl", ["2+3=", chat("2+3?")]), tiny_tokenizer)
    assert [prompt.chat for prompt in prompts] == [None, tuple(chat("2+3?"))]


def test_a_shortened_chat_is_kept_whole(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", [chat("2+3?")]), tiny_tokenizer, limit=4, truncation="left")
    assert (len(prompt.ids), prompt.chat) == (4, tuple(chat("2+3?")))


def test_the_chat_of_an_older_dataset_is_its_messages(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    old = {"role": ["system", "user"], "content": ["Add.", "1+1"], "name": [None, "Ada"]}
    Dataset.from_dict({"messages": [old]}).save_to_disk(tmp_path / "saved")
    (prompt,) = load(str(tmp_path / "saved"), tiny_tokenizer, prompt_key="messages")
    system, user = chat("1+1")
    assert prompt.chat == (system, {**user, "name": "Ada"})
    assert "1+1" in prompt.text
    assert prompt.columns == {}


def test_empty_fields_of_a_message_are_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": Value("string")}
    data = Dataset.from_dict({"prompt": [chat("x")]}).cast_column("prompt", List(message))
    data.save_to_disk(tmp_path / "saved")
    tokenizer = cast(PreTrainedTokenizerFast, _with_first_token(tiny_tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ 'tool_calls' in m }}{% endfor %}"
    (prompt,) = load(str(tmp_path / "saved"), tokenizer)
    assert prompt.text == "Add.FalsexFalse"


def test_sources_are_one_after_another_with_all_their_columns(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pd.DataFrame({"prompt": ["p0", "p1"], "answer": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    second = write(tmp_path / "b.jsonl", [chat("j0")], answer=["three"], data_source=["mine"])
    prompts = load([str(tmp_path / "a.parquet"), second], tiny_tokenizer)
    assert [prompt.row for prompt in prompts] == [0, 1, 2]
    assert [prompt.columns for prompt in prompts] == [{"answer": 1}, {"answer": 2}, {"answer": "three"}]
    assert [prompt.data_source for prompt in prompts] == ["", "", "mine"]
    assert prompts[-1] == prompts[2] and prompts[1:] == [prompts[1], prompts[2]]
    assert prompts.lengths.tolist() == [len(prompt.ids) for prompt in prompts]
    for index in (3, -4):
        with pytest.raises(IndexError):
            prompts[index]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    limit=st.integers(1, 9),
)
def test_the_filter_keeps_what_fits_in_order(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, lengths: list[list[int]], limit: int
) -> None:
    texts = [
        [f"{number}{row}xxxxxxxxx"[:length] for row, length in enumerate(file)]
        for number, file in enumerate(lengths)
    ]
    files = [
        write(tmp_path / f"{number}.jsonl", file, n=range(len(file))) for number, file in enumerate(texts)
    ]
    kept = [(text, n) for file in texts for n, text in enumerate(file) if len(text) <= limit]
    if not kept:
        with pytest.raises(
            DataError,
            match=rf"is longer than {limit} tokens(.|\n)*The shortest has {min(map(min, lengths))}:",
        ):
            load(files, tiny_tokenizer, limit=limit, filter_overlong=True)
        return
    prompts = load(files, tiny_tokenizer, limit=limit, filter_overlong=True)
    assert [(prompt.text, prompt.columns["n"]) for prompt in prompts] == kept
    assert [prompt.row for prompt in prompts] == list(range(len(kept)))


@pytest.mark.parametrize(("truncation", "expected"), [("left", ["efgh", "abc"]), ("right", ["abcd", "abc"])])
def test_truncation_cuts_the_named_end(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, truncation: Truncation, expected: list[str]
) -> None:
    prompts = load(
        write(tmp_path / "a.jsonl", ["abcdefgh", "abc"]), tiny_tokenizer, limit=4, truncation=truncation
    )
    assert [prompt.text for prompt in prompts] == expected


def test_a_prompt_too_long_is_an_error_that_says_how_long(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", ["abc", "abcdef", "abcd", "abcdefghi"])
    with pytest.raises(DataError) as caught:
        load(path, tiny_tokenizer, limit=4)
    assert str(caught.value) == (
        f"{path}, row 1 (the first is 0): the prompt has 6 tokens, and data.max_prompt_length is 4. "
        "2 of 4 prompts are too long; the longest has 9 tokens.\n"
        "Raise data.max_prompt_length, or drop such prompts (data.filter_overlong_prompts: true), "
        "or truncate them (data.truncation: left or right)."
    )


def test_a_line_tells_what_was_read_and_dropped(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    files = [write(tmp_path / "a.jsonl", ["abcde", "a"]), write(tmp_path / "b.jsonl", ["b"])]
    out = io.StringIO()
    load(files, tiny_tokenizer, limit=4, filter_overlong=True, console=Console(file=out, width=40))
    assert out.getvalue() == (
        f"{files[0]}: 2 prompts, 1 longer than 4 tokens dropped\n{files[1]}: 1 prompt\n"
    )


def test_a_terminal_gets_a_bar(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    load(write(tmp_path / "a.jsonl", ["a"] * 10), tiny_tokenizer, console=console)
    assert "━" in out.getvalue()


def test_a_missing_column_is_answered_with_the_nearest(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", ["a"], messages=["b"])
    with pytest.raises(
        DataError,
        match=r"a\.jsonl has no column 'message'; did you mean 'messages'\?\nIt has: prompt, messages",
    ):
        load(path, tiny_tokenizer, prompt_key="message")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "is empty (null)"),
        (7, "is of type int, neither a chat"),
        ({"role": "user", "content": "x"}, "is of type dict, neither a chat"),
        ([], "is a chat without messages"),
        (["hello"], "its message 0 is of type str"),
        ([{"role": "user"}], "its message 0 has no content (it has role)"),
        ([*chat("x"), {"content": "x", "name": "y"}], "its message 2 has no role (it has content, name)"),
        ([{"role": "user", "content": None}], "its message 0 has no content (it has role)"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "is of type list, not a string (the model reads texts only",
        ),
        ([{"role": 1, "content": "x"}], "the role of its message 0 is of type int"),
        ("", "is empty."),
    ],
)
def test_a_row_without_a_prompt_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, prompt: Any, message: str
) -> None:
    files = [write(tmp_path / "a.jsonl", ["fine"]), write(tmp_path / "b.jsonl", [chat("fine"), prompt])]
    with pytest.raises(
        DataError, match=rf"b\.jsonl, row 1 \(the first is 0\): the prompt .*{re.escape(message)}"
    ):
        load(files, tiny_tokenizer)


def test_rows_far_down_have_their_own_number(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    Dataset.from_dict({"prompt": ["x"] * 2345 + [None]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="row 2345 "):
        load(str(tmp_path / "saved"), tiny_tokenizer)


def test_a_chat_that_the_template_refuses_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = cast(PreTrainedTokenizerFast, _with_first_token(tiny_tokenizer))
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"row 0 .* rejects: System role not supported"):
        load(write(tmp_path / "a.jsonl", [chat("x")]), tokenizer)


def test_chats_need_a_template(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = cast(PreTrainedTokenizerFast, _with_first_token(tiny_tokenizer))
    tokenizer.chat_template = None
    assert len(load(write(tmp_path / "a.jsonl", ["plain"]), tokenizer)) == 1
    with pytest.raises(
        DataError, match=r"b\.jsonl are chats, .* has no chat template\.\nSet data\.tokenizer"
    ):
        load(write(tmp_path / "b.jsonl", [chat("x")]), tokenizer)


def test_no_chat_is_no_messages() -> None:
    with pytest.raises(PromptError, match="neither a chat"):
        as_messages({"role": "user", "content": "x"})


def test_a_fingerprint_is_of_prompts_and_ground_truths_wherever_they_lie(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts, truths = ["1+1=", "2+3=", "a long one", "4+4="], ["2", "5", None, "8"]
    whole = load(write(tmp_path / "a.jsonl", texts, ground_truth=truths), tiny_tokenizer)
    known = whole.fingerprint()
    assert known["rows"] == 4 and known["columns"] == ["ground_truth"]
    parts = [
        write(tmp_path / f"{i}.jsonl", texts[part], ground_truth=truths[part])
        for i, part in enumerate((slice(1), slice(1, 4)))
    ]
    assert load(parts, tiny_tokenizer).fingerprint() == known
    assert load(parts[::-1], tiny_tokenizer).fingerprint()["prompts"] != known["prompts"]
    other = load(write(tmp_path / "b.jsonl", texts, ground_truth=["2", "6", None, "8"]), tiny_tokenizer)
    assert other.fingerprint() == known | {"ground_truths": other.fingerprint()["ground_truths"]}
    assert other.fingerprint() != known
    short = load(parts, tiny_tokenizer, limit=5, filter_overlong=True)
    left = write(tmp_path / "c.jsonl", [texts[i] for i in (0, 1, 3)], ground_truth=["2", "5", "8"])
    assert short.fingerprint() == load(left, tiny_tokenizer).fingerprint()
    assert short.without_ground_truth().tolist() == []
    assert whole.without_ground_truth().tolist() == [2]


def test_prompts_are_named_by_their_file_and_row_there(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Also after the length filter has dropped rows, and in a second file."""
    first = write(tmp_path / "first.jsonl", ["long" * 9, "a", "long" * 9, "b"])
    second = write(tmp_path / "second.jsonl", ["long" * 9, "c"])
    prompts = load([first, second], tiny_tokenizer, limit=3, filter_overlong=True)
    assert [(each.text, each.source, each.source_row, each.row) for each in prompts] == [
        ("a", first, 1, 0), ("b", first, 3, 1), ("c", second, 1, 2)
    ]  # fmt: skip
    assert [prompts.place(i) for i in range(3)] == [each.place for each in prompts]
    assert prompts[2].place == f"{second}, row 1 (the first is 0)"


def test_nulls_of_other_rows_are_not_in_a_ground_truth(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Parquet gives every row the fields of all; what the reward reads is what the row was written with."""
    truths = [{"value": "2"}, {"cases": [{"in": "1"}, {"out": "2"}], "language": "python"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "ground_truth": truth} for truth in truths]), path)
    assert [each.ground_truth for each in load(str(path), tiny_tokenizer)] == truths
    nested = [{"prompt": "a", "reward_model": {"ground_truth": truth}} for truth in truths]
    pq.write_table(pa.Table.from_pylist(nested), path)
    assert [each.ground_truth for each in load(str(path), tiny_tokenizer)] == truths


def test_a_part_of_the_rows(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{i:03}" for i in range(300)]
    files = [
        write(tmp_path / "a.jsonl", texts[:100], ground_truth=texts[:100]),
        write(tmp_path / "b.jsonl", texts[100:], ground_truth=texts[100:]),
    ]

    def used(**options: Any) -> list[str]:
        return [prompt.text for prompt in load(files, tiny_tokenizer, **options)]

    assert used(max_samples=120) == texts[:120]
    for everything in (None, -1, 0, 300, 1000):
        assert used(max_samples=everything, seed=1) == texts
    drawn = used(max_samples=120, seed=1)
    assert len(set(drawn)) == 120 and drawn == sorted(drawn) == used(max_samples=120, seed=1)
    assert set(drawn) & set(texts[:100]) and set(drawn) & set(texts[100:]) and drawn != texts[:120]
    assert drawn != used(max_samples=120, seed=2)


def test_rows_of_a_part_keep_their_names_and_ground_truths(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [f"{i:03}" for i in range(50)]
    truths = [None if i % 2 else text for i, text in enumerate(texts)]
    console = Console(file=io.StringIO())
    file = write(tmp_path / "a.jsonl", texts, ground_truth=truths)
    prompts = load(file, tiny_tokenizer, max_samples=20, seed=3, console=console)
    assert all(prompt.text == texts[prompt.source_row] for prompt in prompts)
    without = [i for i, prompt in enumerate(prompts) if prompt.source_row % 2]
    assert prompts.without_ground_truth().tolist() == without
    assert isinstance(console.file, io.StringIO) and "20 of 50 prompts" in console.file.getvalue()


def test_rows_that_are_not_used_are_not_read(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    good = write(tmp_path / "good.jsonl", ["a", "b"])
    bad = write(tmp_path / "bad.jsonl", ["c", 7, "d"])
    assert [prompt.text for prompt in load([good, bad], tiny_tokenizer, max_samples=3)] == ["a", "b", "c"]
    assert [prompt.text for prompt in load([good, bad], tiny_tokenizer, max_samples=2)] == ["a", "b"]
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1 "):
        load([good, bad], tiny_tokenizer, max_samples=4)


def test_of_many_rows_the_first_are_tokenized_first(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A prompt that is too long, or of an unknown token, near the beginning costs a thousand rows and no more."""
    few = write(tmp_path / "few.jsonl", ["a"] * 3)
    early = write(tmp_path / "early.jsonl", ["a"] * 7 + ["too long"] + ["a"] * 12_000)
    late = write(tmp_path / "late.jsonl", ["a"] * 12_000 + ["too long"] * 2)
    tokenizer = Counting(tiny_tokenizer)
    with pytest.raises(DataError, match=r"early.jsonl, row 7 .* 1 of the first 1000 prompts are too long"):
        load([few, early], cast(Any, tokenizer), limit=5)
    assert tokenizer.texts <= 1003
    tokenizer.texts = 0
    with pytest.raises(DataError, match=r"early.jsonl, row 0 .*'a'"):
        load(early, cast(Any, tokenizer), vocabulary=tiny_tokenizer("a")["input_ids"][0])
    assert tokenizer.texts <= 1000
    with pytest.raises(DataError, match=r"row 12000 .* 2 of 12002 prompts are too long"):
        load(late, cast(Any, tokenizer), limit=5)
    assert len(load(late, cast(Any, tokenizer), limit=5, filter_overlong=True)) == 12_000


class Counting:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.texts = 0

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.texts += len(texts) if isinstance(texts, list) else 1
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)
