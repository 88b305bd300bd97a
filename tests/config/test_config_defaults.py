"""Defaults give way to what the user sets, and the command line to nothing."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iiverl_core.config import Loaded, load

ROOT = Path(__file__).parents[2]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MINI_BATCH = f"{ACTOR}.ppo_mini_batch_size"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that sets nothing."""
    file = tmp_path_factory.mktemp("defaults") / "run.yaml"
    file.touch()
    return file


def codes(loaded: Loaded) -> list[str]:
    return [problem.code for problem in loaded.errors]


@pytest.mark.parametrize(
    ("batch", "mini"),
    [
        *((1024, 256), (512, 256), (256, 256), (768, 256), (1000, 250), (384, 192)),
        *((64, 64), (2, 2), (1, 1)),
        *((300, 300), (320, 320), (257, 257), (2018, 1009), (10**9 + 7, 1)),
    ],
)
def test_mini_batches_follow_the_batch(empty: Path, batch: int, mini: int) -> None:
    loaded = load(empty, [f"data.train_batch_size={batch}", "trainer.n_gpus_per_node=1"])
    assert not loaded.errors
    assert loaded.config.actor_rollout_ref.actor.ppo_mini_batch_size == mini
    assert loaded.config.critic.ppo_mini_batch_size == mini
    fits = "" if mini == 256 else ", derived from data.train_batch_size"
    assert str(loaded.origins[MINI_BATCH]) == f"default{fits}"


def test_a_mini_batch_that_is_set_stays(empty: Path) -> None:
    loaded = load(empty, ["data.train_batch_size=64", f"{MINI_BATCH}=256"])
    assert codes(loaded) == ["C101"]
    assert loaded.config.actor_rollout_ref.actor.ppo_mini_batch_size == 256
    own = load(empty, ["data.train_batch_size=64", "critic.ppo_mini_batch_size=16"]).config
    assert (own.actor_rollout_ref.actor.ppo_mini_batch_size, own.critic.ppo_mini_batch_size) == (64, 16)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 5000),
    prompt=st.integers(1, 200_000),
    response=st.integers(1, 200_000),
    devices=st.integers(1, 16),
    sequences=st.none() | st.integers(1, 100_000),
    tokens=st.none() | st.integers(1, 100_000),
    chunked=st.booleans(),
    backend=st.sampled_from(["fsdp", "megatron"]),
)
def test_defaults_contradict_no_size_and_no_length(
    empty: Path,
    batch: int,
    prompt: int,
    response: int,
    devices: int,
    sequences: int | None,
    tokens: int | None,
    chunked: bool,
    backend: str,
) -> None:
    overrides = [
        f"data.train_batch_size={batch * devices}",
        f"data.max_prompt_length={prompt}",
        f"data.max_response_length={response}",
        f"trainer.n_gpus_per_node={devices}",
        f"{ROLLOUT}.enable_chunked_prefill={str(chunked).lower()}",
    ]
    if sequences:
        overrides.append(f"{ROLLOUT}.max_num_seqs={sequences}")
    if tokens and not sequences and chunked:
        overrides.append(f"{ROLLOUT}.max_num_batched_tokens={tokens}")
    loaded = load(empty, overrides, backend)
    assert codes(loaded) == []
    rollout, longest = loaded.config.actor_rollout_ref.rollout, prompt + response
    assert rollout.max_num_batched_tokens >= rollout.max_num_seqs
    assert loaded.config.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu >= longest
    assert loaded.config.critic.forward_max_token_len_per_gpu >= longest


def test_defaults_that_fit_stay_as_they_are(empty: Path) -> None:
    loaded = load(empty)
    assert not [path for path, origin in loaded.origins.items() if "to fit" in str(origin)]


@pytest.mark.parametrize(
    ("devices", "more", "tensor"),
    [
        (8, [], 4),
        (6, [], 2),
        (1, [], 1),
        (8, [f"{ACTOR}.megatron.pipeline_model_parallel_size=4"], 2),
        (8, [f"{ACTOR}.megatron.context_parallel_size=8"], 1),
        (8, ["actor_rollout_ref.model.path=./two_kv_heads"], 4),
        (8, ["actor_rollout_ref.model.path=./fourteen_heads"], 2),
    ],
)
def test_the_tensor_size_fits_devices_and_model(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, more: list[str], tensor: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, heads in (("two_kv_heads", 8), ("fourteen_heads", 14)):
        Path(name).mkdir()
        shape = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": 2}
        shape |= {
            "model_type": "qwen2",
            "vocab_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "head_dim": 8,
        }
        Path(name, "config.json").write_text(json.dumps(shape))
    loaded = load(empty, [f"trainer.n_gpus_per_node={devices}", "critic.enable=false", *more], "megatron")
    assert {"C801", "C809"}.isdisjoint(codes(loaded))
    assert loaded.config.actor_rollout_ref.actor.megatron.tensor_model_parallel_size == tensor
    assert loaded.config.critic.megatron.tensor_model_parallel_size == tensor


def readme_configurations() -> list[str]:
    """The configurations that the README shows."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "train_files:" in block]


@pytest.mark.parametrize("batch", [256, 2])
@pytest.mark.parametrize("text", readme_configurations())
def test_the_readmes_configuration_is_valid_with_any_batch(tmp_path: Path, text: str, batch: int) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    loaded = load(file, [f"data.train_batch_size={batch}"])
    assert not loaded.errors
    assert loaded.config.actor_rollout_ref.actor.ppo_mini_batch_size == batch


def test_the_readme_shows_a_configuration() -> None:
    assert readme_configurations()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2", "megatron", "deepspeed"])
@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_the_command_lines_backend_wins(tmp_path: Path, backend: str, strategy: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"actor_rollout_ref: {{actor: {{strategy: {strategy}}}}}\n"
        f"critic: {{strategy: {strategy}, model: {{path: org/name}}}}\n"
        f"reward_model: {{enable: true, strategy: {strategy}, model: {{path: org/name}}}}\n"
    )
    loaded = load(file, backend=backend)
    assert not loaded.errors
    assert loaded.config.backend == backend
    agrees = strategy == backend or (backend, strategy) == ("fsdp", "fsdp2")
    for key, section in (
        (f"{ACTOR}.strategy", loaded.config.actor_rollout_ref.actor),
        ("critic.strategy", loaded.config.critic),
        ("reward_model.strategy", loaded.config.reward_model),
    ):
        assert section.strategy == (strategy if agrees else backend)
        assert (str(loaded.origins[key]) == "command line") != agrees


@pytest.mark.parametrize("name", ["grpo", "ppo", "reward_api", "reward_api_commented"])
@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_files_of_ii_verl_are_valid_under_either_backend(name: str, backend: str) -> None:
    assert not load(Path(__file__).parent / f"ii_verl_{name}.yaml", backend=backend).errors


def test_two_backends_on_the_command_line_are_an_error(empty: Path) -> None:
    assert codes(load(empty, [f"{ACTOR}.strategy=megatron"], "fsdp")) == ["C017"]
    assert codes(load(empty, [f"{ACTOR}.strategy=fsdp2"], "fsdp")) == []


def test_defaults_of_an_invalid_value_say_so(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  seed: x\n  shuffle: no\n")
    origins = load(file).origins
    assert str(origins["data.seed"]) == f"default; the value from {file}:2 is invalid"
    assert str(origins["data.shuffle"]) == f"{file}:3"


def test_overrides_are_read_as_utf_8_whatever_the_terminals_encoding(empty: Path) -> None:
    as_ascii = "trainer.project_name=modèle".encode().decode("ascii", "surrogateescape")
    assert load(empty, [as_ascii]).config.trainer.project_name == "modèle"
    with pytest.MonkeyPatch.context() as patch:  # a terminal in which any byte is a character
        patch.setattr("os.fsencode", lambda text: text.encode("latin-1"))
        as_latin_1 = "trainer.project_name=modèle".encode().decode("latin-1")
        assert load(empty, [as_latin_1]).config.trainer.project_name == "modèle"
        assert load(empty, ["trainer.project_name=modèle"]).config.trainer.project_name == "modèle"
    latin_1 = "trainer.project_name=modèle".encode("latin-1").decode("utf-8", "surrogateescape")
    loaded = load(empty, [latin_1])
    assert codes(loaded) == ["C010"]
    assert "is not UTF-8 text" in loaded.errors[0].message
