"""Files become configurations: values as researchers write them, references, overrides, origins."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from iiverl_core.config import Config, Loaded, build, load, show
from iiverl_core.errors import ConfigError
from iiverl_core.registry import BACKENDS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def loading(tmp_path: Path):
    def load_text(text: str = "", *overrides: str, backend: str | None = None) -> Loaded:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return load(file, overrides, backend)

    return load_text


@pytest.mark.parametrize("name", ["grpo", "ppo", "reward_api", "reward_api_commented"])
def test_files_of_ii_verl_are_valid_as_they_stand(name: str) -> None:
    loaded = load(HERE / f"ii_verl_{name}.yaml")
    assert not loaded.errors
    assert {problem.severity for problem in loaded.obstacles} <= {"input", "unsupported"}


def test_values_of_an_ii_verl_file_arrive() -> None:
    config = load(HERE / "ii_verl_grpo.yaml").config
    assert config.algorithm.adv_estimator == "grpo"
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    assert config.actor_rollout_ref.rollout.n == 5
    assert config.data.train_files == ("data/gsm8k/train.parquet",)
    assert config.trainer.project_name == "verl_grpo_example_gsm8k"


def test_an_ii_verl_file_of_ppo_gets_the_warnings_it_needs() -> None:
    loaded = load(HERE / "ii_verl_ppo.yaml")
    assert loaded.config.uses_critic
    assert loaded.config.reward_model.enable
    assert loaded.config.trainer.logged_generations == 8
    warnings = [problem for problem in loaded.problems if problem.severity == "warning"]
    assert [(problem.key, problem.line) for problem in warnings] == [("data.return_raw_chat", 7)]


def test_a_critic_s_settings_in_a_grpo_file_are_reported_once(loading) -> None:
    text = (
        "algorithm: {adv_estimator: ESTIMATOR, use_kl_in_reward: false}\n"
        "actor_rollout_ref: {rollout: {n: 2}}\n"
        "critic: {model: {path: org/name}, ppo_micro_batch_size_per_gpu: 1, cliprange_value: 0.2}\n"
        "trainer: {critic_warmup: 3}\n"
    )

    def reported(estimator: str, *overrides: str) -> list[str]:
        problems = loading(text.replace("ESTIMATOR", estimator), *overrides).problems
        return [p.key for p in problems if p.key.startswith(("critic", "trainer.critic"))]

    assert len(reported("grpo")) == 1
    assert len(reported("grpo", "critic.enable=false")) == 1
    assert reported("grpo", "critic.enable=true") == []
    assert reported("gae") == []


def test_an_algorithm_of_one_s_own_is_a_file_and_a_name(loading, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").write_text(
        "raise RuntimeError('a check runs nothing')\ndef mine(batch, settings): ...\n"
    )
    loaded = loading(
        "algorithm: {adv_estimator: '~/own.py:mine', use_kl_in_reward: false}\n"
        f"actor_rollout_ref: {{actor: {{policy_loss: {{loss_mode: '{tmp_path}/own.py:mine'}}}}}}\n"
    )
    assert loaded.config.algorithm.adv_estimator == f"{tmp_path}/own.py:mine"
    assert loaded.config.actor_rollout_ref.actor.policy_loss.loss_mode == f"{tmp_path}/own.py:mine"
    assert not loaded.config.uses_critic
    assert not [p for p in loaded.problems if p.key.endswith(("adv_estimator", "loss_mode"))]


def test_generations_are_shown_under_either_name(loading) -> None:
    def shown(log: int, former: int) -> int:
        text = f"trainer: {{log_val_generations: {log}, val_generations_to_log_to_wandb: {former}}}"
        return loading(text).config.trainer.logged_generations

    assert (shown(0, 0), shown(3, 0), shown(0, 4), shown(3, 4), shown(5, 4)) == (0, 3, 4, 4, 5)


def test_rejection_takes_unset_bounds_from_the_cap(loading) -> None:
    def bounds(text: str) -> tuple[float, float]:
        return loading(
            f"algorithm: {{rollout_correction: {{{text}}}}}"
        ).config.algorithm.rollout_correction.rejection_bounds

    assert bounds("rollout_rs: token") == (0.5, 2.0)
    assert bounds("rollout_rs: token, rollout_is_threshold: 4") == (0.25, 4.0)
    assert bounds("rollout_rs: token, rollout_rs_threshold: 5") == (0.2, 5.0)
    assert bounds("rollout_rs: token, rollout_rs_threshold: 5, rollout_rs_threshold_lower: 0.9") == (0.9, 5.0)


@pytest.mark.parametrize(
    ("trainer", "size"),
    [
        ("n_gpus_per_node: 8", 4),  # 96 GB, of which 30 fit beside a cache
        ("n_gpus_per_node: 6", 6),
        ("n_gpus_per_node: 7", 7),
        ("n_gpus_per_node: 1", 1),
        ("n_gpus_per_node: 1, nnodes: 2", 1),  # not over machines
        ("n_gpus_per_node: 8, rollout_devices: 3", 3),
        ("n_gpus_per_node: 7, rollout_devices: 4", 4),
        ("nnodes: 3, n_gpus_per_node: '${trainer.nnodes}'", 3),
    ],
)
def test_engines_are_spread_over_as_few_devices_as_hold_the_weights(
    loading, tmp_path: Path, trainer: str, size: int
) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 7 * 8 * 9 * 5 * 8, "num_hidden_layers": 64}
    heads = {"num_attention_heads": 7 * 8 * 9, "num_key_value_heads": 7 * 8 * 9, "head_dim": 16}
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 32000, **shape, **heads})
    )
    text = f"trainer: {{{trainer}}}\ndata: {{train_batch_size: 504}}\n"
    assert loading(text).config.engine_devices == 1  # the model is not here
    text += f"actor_rollout_ref: {{model: {{path: {tmp_path}/large}}}}\n"
    loaded = loading(text)
    assert not loaded.errors
    assert loaded.config.engine_devices == size
    fits = "" if size == 1 else ", derived from the devices and the model"
    assert str(loaded.origins["actor_rollout_ref.rollout.tensor_model_parallel_size"]) == f"default{fits}"
    reported = loading(text, "actor_rollout_ref.rollout.tensor_model_parallel_size=5")
    assert reported.config.engine_devices == 5
    assert reported.errors[0].code == "C708"


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.y*ml")), ids=lambda f: f.parent.name)
def test_every_example_is_valid(file: Path) -> None:
    assert not load(file).errors


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("True", True),
        ("true", True),
        ('"true"', True),
        ("yes", True),
        ('"False"', False),
        ("off", False),
    ],
)
def test_booleans(loading, written: str, value: bool) -> None:
    loaded = loading(f"data: {{shuffle: {written}}}")
    assert not loaded.errors
    assert loaded.config.data.shuffle is value


@pytest.mark.parametrize("written", ["1e-6", "1E-6", '"1e-6"', "1.0e-6", ".000001", "0.000_001", "1e-06"])
def test_numbers(loading, written: str) -> None:
    loaded = loading(f"actor_rollout_ref: {{actor: {{optim: {{lr: {written}}}}}}}")
    assert not loaded.errors
    assert loaded.config.actor_rollout_ref.actor.optim.lr == 1e-6


@pytest.mark.parametrize("written", ["1024", "1_024", "0x400", '"1024"', "1024.0", "1.024e3"])
def test_whole_numbers(loading, written: str) -> None:
    loaded = loading(f"data: {{train_batch_size: {written}}}")
    assert not loaded.errors
    assert loaded.config.data.train_batch_size == 1024


@pytest.mark.parametrize("written", ["2024-01-01", "1:30", "007", "7", '"~"', "a b"])
def test_words_stay_as_they_are_written(loading, written: str) -> None:
    loaded = loading(f"trainer: {{project_name: {written}}}")
    assert not loaded.errors
    assert loaded.config.trainer.project_name == written.strip('"')


def test_home_folder_empty_sections_and_single_files(loading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    config = loading("data:\n  train_files: ~/a.parquet\ntrainer:\nalgorithm: {}\n").config
    assert config.data.train_files == ("/home/ada/a.parquet",)
    assert config.trainer.total_epochs == 30


def test_training_data_without_validation_data_is_not_validated(loading) -> None:
    assert loading("data: {train_files: a.parquet}").config.data.val_files is None
    assert loading("data: {train_files: a.parquet, val_files: b.parquet}").config.data.val_files == (
        "b.parquet",
    )
    assert loading("trainer: {nnodes: 1}").config.data.val_files is not None


def test_top_k_zero_is_off(loading) -> None:
    assert loading("actor_rollout_ref: {rollout: {top_k: 0}}").config.actor_rollout_ref.rollout.top_k == -1


def test_merge_keys_and_aliases(loading) -> None:
    loaded = loading(
        "actor_rollout_ref:\n"
        "  actor:\n"
        "    optim: &optim\n"
        "      lr: 2e-6\n"
        "      weight_decay: 0.1\n"
        "critic:\n"
        "  optim:\n"
        "    <<: *optim\n"
        "    lr: 3e-6\n"
    )
    assert not loaded.errors
    assert loaded.config.critic.optim.lr == 3e-6
    assert loaded.config.critic.optim.weight_decay == 0.1
    assert str(loaded.origins["critic.optim.lr"]).endswith("run.yaml:9")
    assert str(loaded.origins["critic.optim.weight_decay"]).endswith("run.yaml:5")


def test_references_keep_types_and_make_strings(loading) -> None:
    config = loading(
        "data: {max_prompt_length: 64, max_response_length: '${data.max_prompt_length}'}\n"
        "actor_rollout_ref: {model: {override_config: {rope: {theta: 5}}}}\n"
        "trainer: {project_name: p, experiment_name: '${trainer.project_name}-${data.max_prompt_length}'}\n"
        "custom_reward_function:\n"
        "  path: null\n"
        "  reward_kwargs:\n"
        "    lengths: ['${data.max_prompt_length}', 'of ${trainer.project_name}', '\\${plain}']\n"
        "    theta: ${actor_rollout_ref.model.override_config.rope.theta}\n"
        "    loss: ${algorithm.kl_ctrl}\n"
    ).config
    assert config.data.max_response_length == 64
    assert config.actor_rollout_ref.rollout.response_length == 64
    assert config.trainer.experiment_name == "p-64"
    assert config.trainer.default_local_dir == "checkpoints/p/p-64"
    kwargs = {
        "lengths": [64, "of p", "${plain}"],
        "theta": 5,
        "loss": {"type": "fixed", "kl_coef": 0.001, "target_kl": None, "horizon": None},
    }
    assert config.custom_reward_function.reward_kwargs == kwargs


def test_null_for_a_key_that_follows_lets_it_follow(loading) -> None:
    loaded = loading("actor_rollout_ref: {actor: {clip_ratio: 0.3, clip_ratio_high: null}}")
    assert not loaded.errors
    assert loaded.config.actor_rollout_ref.actor.clip_ratio_high == 0.3


def test_null_is_a_value_of_its_own_where_what_is_followed_cannot_be_null(loading) -> None:
    loaded = loading(
        "actor_rollout_ref: {model: {path: policy, external_lib: library}}\n"
        "reward_model: {model: {input_tokenizer: null, external_lib: null}}\n"
    )
    assert (
        loaded.config.reward_model.model.input_tokenizer is None
    )  # the reward model reads the policy's tokens
    assert loaded.config.reward_model.model.external_lib == "library"


def test_overrides_are_yaml_and_the_last_one_counts(loading) -> None:
    loaded = loading(
        "trainer: {total_epochs: 3}\n",
        "trainer.total_epochs=4",
        "trainer.total_epochs=5",
        "trainer.logger=[console, jsonl]",
        "data={seed: 7, shuffle: no}",
        "actor_rollout_ref.actor.optim.lr=1e-5",
        "actor_rollout_ref.model.override_config.rope.theta=9",
        "custom_reward_function.reward_kwargs.text=a=b",
    )
    config = loaded.config
    assert not loaded.errors
    assert config.trainer.total_epochs == 5
    assert config.trainer.logger == ("console", "jsonl")
    assert (config.data.seed, config.data.shuffle) == (7, False)
    assert config.actor_rollout_ref.actor.optim.lr == 1e-5
    assert config.actor_rollout_ref.model.override_config == {"rope": {"theta": 9}}
    assert config.custom_reward_function.reward_kwargs == {"text": "a=b"}


def test_origins(loading) -> None:
    text = "data:\n  seed: 3\n  max_prompt_length: 8\n"
    origins = loading(text, "data.max_prompt_length=16", backend="megatron").origins
    assert str(origins["data.seed"]).endswith("run.yaml:2")
    assert str(origins["data.max_prompt_length"]) == "command line"
    assert (
        str(origins["actor_rollout_ref.rollout.prompt_length"]) == "default, same as data.max_prompt_length"
    )
    assert str(origins["actor_rollout_ref.actor.shuffle"]) == "default of backend megatron"
    assert str(origins["actor_rollout_ref.actor.strategy"]) == "command line"
    assert str(origins["trainer.nnodes"]) == "default"


def test_the_backend_comes_from_the_file_or_is_asked_for(loading) -> None:
    megatron = "actor_rollout_ref: {actor: {strategy: megatron}}"
    assert loading().config.backend == "fsdp"
    assert loading("actor_rollout_ref: {actor: {strategy: fsdp2}}").config.backend == "fsdp"
    assert loading(megatron).config.backend == "megatron"
    assert loading(backend="megatron").config.backend == "megatron"


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_a_backend_that_is_not_installed(loading, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def reported(loaded: Loaded) -> list[tuple[str, str, str | None]]:
        return [(p.severity, p.key, p.file) for p in loaded.problems if p.code == "C701"]

    key = "actor_rollout_ref.actor.strategy"
    text = f"actor_rollout_ref: {{actor: {{strategy: {backend}}}, rollout: {{name: hf}}}}"
    assert not reported(loading(text))
    monkeypatch.setattr("iiverl_core.registry.registry.entry_points", lambda group: ())
    BACKENDS.reload()
    try:
        assert reported(loaded := loading(text)) == [("unsupported", key, loaded.path)]
        asked = loading("actor_rollout_ref: {rollout: {name: hf}}", backend=backend)
        assert reported(asked) == [("unsupported", key, "command line")]
    finally:
        monkeypatch.undo()
        BACKENDS.reload()


@pytest.mark.parametrize("role", ["actor_rollout_ref.ref", "critic", "reward_model"])
def test_under_megatron_all_models_have_the_actors_layout(loading, role: str) -> None:
    actor = "actor_rollout_ref.actor.megatron"
    loaded = loading(
        "",
        f"{actor}={{tensor_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 3, dtype: fp32}}",
        f"{role}.megatron.seed=7",
        backend="megatron",
    )
    section = loaded.config
    for name in role.split("."):
        section = getattr(section, name)
    own = loaded.config.actor_rollout_ref.actor.megatron
    assert section.megatron == own.model_copy(update={"seed": 7})
    assert own.tensor_model_parallel_size == 2
    assert str(loaded.origins[f"{role}.megatron.dtype"]) == f"default, same as {actor}.dtype"


def test_kl_goes_where_it_is_asked_for() -> None:
    def wants(use_kl_loss: bool, use_kl_in_reward: bool | None, kl_coef: float = 0.1) -> tuple[bool, bool]:
        actor = {"use_kl_loss": use_kl_loss}
        algorithm = {"use_kl_in_reward": use_kl_in_reward, "kl_ctrl": {"kl_coef": kl_coef}}
        config = build({"actor_rollout_ref": {"actor": actor}, "algorithm": algorithm})
        return config.kl_in_reward, config.needs_reference

    assert wants(False, None) == (True, True)
    assert wants(True, None) == (False, True)
    assert wants(False, False) == (False, False)
    assert wants(False, None, kl_coef=0) == (True, False)
    assert wants(True, True) == (True, True)


def test_relative_paths_are_looked_up_from_the_working_folder(loading, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1?", "ground_truth": "2"}')
    (tmp_path / "elsewhere").mkdir()
    text = "data: {train_files: train.jsonl, val_files: null, train_batch_size: 1}"
    monkeypatch.chdir(tmp_path)
    assert not [p for p in loading(text).problems if p.key == "data.train_files"]
    monkeypatch.chdir("elsewhere")
    reported = [p.message for p in loading(text).problems if p.key == "data.train_files"]
    cwd = tmp_path / "elsewhere"
    assert reported == [
        f"not found: train.jsonl (looked in {cwd}); it exists in {tmp_path}, so run from there"
    ]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00data")
    (tmp_path / "control.yaml").write_bytes(b"data: \x01")
    for name in ("nothing.yaml", ".", "binary.yaml", "control.yaml", "a\0b"):
        loaded = load(f"{tmp_path}/{name}")
        assert len(loaded.errors) == len(loaded.problems) == 1, name
        assert "\n" not in loaded.problems[0].message


def test_build_takes_plain_values_or_says_what_is_wrong() -> None:
    assert build({"data": {"train_batch_size": 512}}).data.train_batch_size == 512
    with pytest.raises(ConfigError) as raised:
        build({"data": {"seed": "x", "sed": 1}})
    lines = str(raised.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error[C012]", "error[C015]"]


def test_a_configuration_is_immutable_and_picklable(loading) -> None:
    config = loading("trainer: {logger: console}").config
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="frozen"):
        config.trainer.nnodes = 2


def test_show_loads_to_the_same(loading, tmp_path: Path) -> None:
    loaded = loading(
        "trainer: {project_name: '1e-6', experiment_name: 'no'}\n"
        "custom_reward_function:\n"
        "  reward_kwargs: {a: '007', b: 1:30, c: '\\${x}', d: 'yes', e: \"p: q # r\\n\", f: [1, null, 2.5, '1_0']}\n",
        "data.prompt_key='\\${x}: # y'",
        "actor_rollout_ref.actor.optim.lr=3e-7",
    )
    kwargs = {"a": "007", "b": "1:30", "c": "${x}", "d": "yes", "e": "p: q # r\n", "f": [1, None, 2.5, "1_0"]}
    assert loaded.config.custom_reward_function.reward_kwargs == kwargs
    assert loaded.config.data.prompt_key == "${x}: # y"
    shown = tmp_path / "shown.yaml"
    shown.write_text(show(loaded, describe=True))
    again = load(shown)
    assert not again.errors
    assert again.config == loaded.config


def test_show_says_where_values_come_from(loading) -> None:
    loaded = loading("data:\n  seed: 3\ntrainer:\n  nnodes: 1\n", "trainer.nnodes=2")
    file = f"{loaded.path}:2"
    assert (
        show(loaded, changed=True) == f"data:\n  seed: 3    # {file}\ntrainer:\n  nnodes: 2  # command line"
    )
    assert "  train_batch_size: 1024" in show(loaded)
    described = show(loaded, changed=True, describe=True)
    assert "  # Number of machines.\n  nnodes: 2" in described


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_loading_imports_nothing_heavy(name: str) -> None:
    code = (
        "import sys; from iiverl_core.config import load\n"
        f"load({str(HERE / f'ii_verl_{name}.yaml')!r})\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sections_are_parts_of_the_whole() -> None:
    names = "data actor_rollout_ref critic reward_model reward_api custom_reward_function algorithm trainer"
    names += " global_profiler ray_kwargs"
    assert list(Config.model_fields) == names.split()
