"""Every key of verl's scripts and trainers is known here, under this name or another, or is told with its reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from iiverl_core.config import Loaded, load
from iiverl_core.config.convert import VERL_DEFAULTS
from iiverl_core.config.interpolation import nested
from iiverl_core.config.schema import keys, sections
from iiverl_core.config.sections.section import NotYet
from iiverl_core.config.synonyms import BY_PATH, canonical, other_names
from iiverl_core.config.user_values import UNKNOWN_KEY
from iiverl_core.config.verl_keys import VERL_KEYS, unread

HERE = Path(__file__).parent


def rows(name: str) -> list[list[str]]:
    lines = HERE.joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line.split(" |") for line in lines if not line.startswith("#")]


SCRIPTS = [(key, value.strip()) for key, value in rows("verl_script_keys.txt")]
TRAINERS = [(key, fsdp.strip(), megatron.strip()) for key, fsdp, megatron in rows("verl_trainer_keys.txt")]
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture
def with_overrides(tmp_path: Path) -> Callable[..., Loaded]:
    """Load an empty file with overrides."""
    file = tmp_path / "run.yaml"
    file.touch()
    return lambda *overrides: load(file, overrides)


def of_file(folder: Path, text: str) -> Loaded:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def codes(loaded: Loaded) -> set[str]:
    return {problem.code for problem in loaded.problems}


def test_the_lists_are_whole() -> None:
    assert len(SCRIPTS) > 400
    assert len(TRAINERS) > 900


def test_every_key_of_the_scripts_is_known_or_told(with_overrides: Callable[..., Loaded]) -> None:
    loaded = with_overrides(*(f"+{key}={value}" for key, value in SCRIPTS))
    assert not [problem.key for problem in loaded.unknown_keys]


@pytest.mark.parametrize("column", [1, 2], ids=["fsdp", "megatron"])
def test_defaults_of_the_trainers_run_as_they_are(tmp_path: Path, column: int) -> None:
    """No default of verl is unknown or unsupported; a few are not values of the same key here."""
    written = {row[0]: json.loads(row[column]) for row in TRAINERS if row[column] not in "—…"}
    loaded = of_file(tmp_path, yaml.safe_dump(nested(written)))
    wrong = {
        problem.key for problem in loaded.obstacles if problem.code in (UNKNOWN_KEY, "C018", "C032", "C033")
    }
    assert not wrong
    invalid = {problem.key for problem in loaded.problems if problem.code == "C015"}
    assert invalid == {"data.seed", "reward_model.model.path", "reward_model.model.trust_remote_code"}  # null


def test_what_is_told_is_no_key_and_has_no_other_name() -> None:
    known = {*keys(), *sections(), *other_names(), *BY_PATH}
    assert not known & VERL_KEYS.keys()
    assert not [path for path in (*keys(), *sections(), *BY_PATH) if unread(path)]


@pytest.mark.parametrize("name", other_names())
def test_another_name_leads_to_a_key(name: str) -> None:
    key = canonical(name, None)[0]
    holders = [known for known in keys() if key == known or key.startswith(known + ".")]
    assert holders or key in sections() or unread(f"{key}.url")
    assert name not in keys()


def test_reasons_are_clauses() -> None:
    for path, mark in VERL_KEYS.items():
        text = mark.what if isinstance(mark, NotYet) else mark.why
        assert text and not text.endswith("."), path


def test_a_key_under_another_name_is_set(tmp_path: Path) -> None:
    loaded = of_file(
        tmp_path,
        """\
critic:
  fsdp: {param_offload: true}
  optim: {lr_scheduler_type: cosine}
actor_rollout_ref:
  rollout:
    checkpoint_engine: {update_weights_bucket_megabytes: 64}
    cudagraph_capture_sizes: [1, 2]
reward:
  custom_reward_function: {path: rewards.py}
  reward_manager: {name: naive}
  reward_model: {model_path: org/judge}
""",
    )
    config = loaded.config
    assert config.critic.model.fsdp_config.param_offload
    assert config.critic.optim.warmup_style == "cosine"
    assert config.actor_rollout_ref.rollout.update_weights_bucket_megabytes == 64
    passed_on = config.actor_rollout_ref.rollout.engine_kwargs.vllm
    assert passed_on == {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}
    assert config.custom_reward_function.path == "rewards.py"
    assert config.reward_model.model.path == "org/judge"
    assert str(loaded.origins["critic.model.fsdp_config.param_offload"]).endswith("run.yaml:2")
    assert not loaded.unknown_keys


def test_arguments_of_the_engine_that_have_a_key_set_it(
    tmp_path: Path, with_overrides: Callable[..., Loaded]
) -> None:
    text = f"actor_rollout_ref: {{rollout: {{engine_kwargs: {{vllm: {VLLM}}}}}}}"
    passed_on = f"{ROLLOUT}.engine_kwargs.vllm"
    for loaded in (
        of_file(tmp_path, text),
        with_overrides(f"{passed_on}={VLLM}"),
        with_overrides(f"+{passed_on}.max_model_len=4096", f"+{passed_on}.block_size=32"),
    ):
        rollout = loaded.config.actor_rollout_ref.rollout
        assert rollout.max_model_len == 4096
        assert rollout.engine_kwargs.vllm == {"block_size": 32}

    both = of_file(tmp_path, text.replace("{engine", "{max_model_len: 2048, engine"))
    assert "C018" in codes(both)


VLLM = "{max_model_len: 4096, block_size: 32}"


def test_a_problem_of_such_a_key_has_both_names(tmp_path: Path) -> None:
    loaded = of_file(tmp_path, "critic:\n  fsdp: {param_offload: 7}\n")
    (problem,) = loaded.errors
    assert (problem.key, problem.line) == ("critic.model.fsdp_config.param_offload", 2)
    assert problem.message.endswith("(written as critic.fsdp.param_offload)")


def test_two_names_in_one_file_agree(tmp_path: Path) -> None:
    text = "critic:\n  fsdp: {{param_offload: {}}}\n  model: {{fsdp_config: {{param_offload: true}}}}\n"
    assert not of_file(tmp_path, text.format("true")).errors
    assert not of_file(tmp_path, text.format("null")).errors
    (problem,) = of_file(tmp_path, text.format("false")).errors
    assert (problem.code, problem.line) == ("C018", 3)
    assert "critic.fsdp.param_offload" in problem.message


def test_the_last_name_on_the_command_line_counts(with_overrides: Callable[..., Loaded]) -> None:
    names = "critic.fsdp.param_offload", "critic.model.fsdp_config.param_offload"
    for first, second in (names, names[::-1]):
        loaded = with_overrides(f"{first}=true", f"{second}=false")
        assert not loaded.errors
        assert loaded.config.critic.model.fsdp_config.param_offload is False


@pytest.mark.parametrize(
    ("key", "value", "code", "severity"),
    [
        ("distillation.enabled", "true", "C033", "unsupported"),
        ("distillation.enabled", "false", None, None),
        (f"{ROLLOUT}.multi_turn.enable", "true", "C251", "error"),
        ("actor_rollout_ref.model.lora.rank", "8", "C033", "unsupported"),
        ("actor_rollout_ref.model.lora.rank", "0", None, None),
        ("actor_rollout_ref.actor.megatron.use_mbridge", "true", "C031", "warning"),
        ("actor_rollout_ref.model.enable_activation_offload", "true", "C031", "warning"),
        ("actor_rollout_ref.model.enable_activation_offload", "${trainer.val_only}", None, None),
        ("actor_rollout_ref.actor.veomni.fsdp_size", "-1", "C031", "warning"),
        ("model_engine", "veomni", "C015", "error"),
        ("trainer.device", "npu", "C015", "error"),
        ("actor_rollout_ref.ref.strategy", "megatron", "C403", "error"),
        ("actor_rollout_ref.actor.optim.override_optimizer_config.eps", "1e-8", None, None),
        ("actor_rollout_ref.actor.optim.override_optimizer_config.eps", "1e-6", "C033", "unsupported"),
        ("critic.optim.override_optimizer_config.fused", "false", "C031", "warning"),
        ("actor_rollout_ref.actor.optim.override_optimizer_config.betas", "[0.9, 0.95]", None, None),
        ("actor_rollout_ref.actor.optim.override_optimizer_config.epps", "1e-6", "C012", "error"),
        ("ray_kwargs.ray_init.num_gpus", "8", "C031", "warning"),
        ("ray_kwargs.ray_init.runtime_env.env_vars", "{A: 1}", None, None),
        ("trainer.v1.frobnicate", "1", "C031", "warning"),
        ("trainer.frobnicate", "1", "C012", "error"),
        ("distilation.enabled", "true", "C012", "error"),
    ],
)
def test_what_becomes_of_a_value(
    with_overrides: Callable[..., Loaded], key: str, value: str, code: str | None, severity: str | None
) -> None:
    told = [
        p for p in with_overrides(f"{key}={value}").problems if p.file == "command line" and p.code != "C910"
    ]
    assert {(p.code, p.severity) for p in told} == ({(code, severity)} if code else set())


def test_keys_with_one_reason_are_one_warning(with_overrides: Callable[..., Loaded]) -> None:
    names = ("use_mbridge", "vanilla_mbridge", "use_dist_checkpointing")
    loaded = with_overrides(*(f"actor_rollout_ref.actor.megatron.{name}=true" for name in names))
    (problem,) = [problem for problem in loaded.problems if problem.code == "C031"]
    assert all(name in problem.key for name in names)


def test_the_backend_by_the_name_of_its_trainer(with_overrides: Callable[..., Loaded]) -> None:
    assert with_overrides("model_engine=megatron").config.backend == "megatron"
    loaded = with_overrides("model_engine=dp", "actor_rollout_ref.actor.strategy=fsdp2")
    assert loaded.config.backend == "fsdp"
    assert not loaded.errors


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    ("path", "value", "at"),
    [
        ("trainer.nnodes", 2, "trainer.nnodes"),
        ("actor_rollout_ref.model.override_config.num_hidden_layers", 2, None),
        ("critic.fsdp.fsdp_size", 8, "critic.model.fsdp_config.fsdp_size"),
    ],
)
def test_keys_are_added_as_in_hydra(
    with_overrides: Callable[..., Loaded], sign: str, path: str, value: Any, at: str | None
) -> None:
    loaded = with_overrides(f"{sign}{path}={value}")
    assert not loaded.errors
    found = loaded.config.at(at) if at else loaded.config.actor_rollout_ref.model.override_config
    assert found == (value if at else {"num_hidden_layers": value})


def test_keys_are_removed_as_in_hydra(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        """\
trainer: {nnodes: 2, n_gpus_per_node: 4}
critic: {fsdp: {fsdp_size: 8}}
data: {apply_chat_template_kwargs: {a: 1, b: 2}}
distillation: {enabled: true}
"""
    )
    removed = ("~trainer.nnodes", "~critic.fsdp", "~data.apply_chat_template_kwargs.a", "~distillation")
    loaded = load(file, removed)
    assert "C033" not in codes(loaded)
    assert not loaded.errors
    config = loaded.config
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 4)
    assert config.critic.model.fsdp_config.fsdp_size == -1
    assert config.data.apply_chat_template_kwargs == {"b": 2}
    assert str(loaded.origins["trainer.nnodes"]) == "default"
    assert load(file, ["~trainer.nnodes=2"]).config.trainer.nnodes == 1
    assert {problem.key for problem in load(file, ["~trainer.nods"]).errors} == {"trainer.nods"}


def test_overrides_alone_are_a_configuration() -> None:
    loaded = load(None, ["trainer.nnodes=2", "trainer.nods=1"])
    assert loaded.config.trainer.nnodes == 2
    assert [(problem.file, problem.key) for problem in loaded.errors] == [("command line", "trainer.nods")]


def test_the_lowest_learning_rate_is_a_number_or_a_fraction(with_overrides: Callable[..., Loaded]) -> None:
    optim = "actor_rollout_ref.actor.optim"
    both = with_overrides(f"{optim}.min_lr=1e-7", f"{optim}.min_lr_ratio=0.5", f"{optim}.warmup_style=cosine")
    assert "C607" in codes(both)
    assert "C607" not in codes(with_overrides(f"{optim}.min_lr=1e-7", f"{optim}.warmup_style=cosine"))


def test_the_norm_of_gradients_has_two_names_under_fsdp(with_overrides: Callable[..., Loaded]) -> None:
    for role in ("actor_rollout_ref.actor", "critic"):
        loaded = with_overrides(f"{role}.optim.clip_grad=0.5", "algorithm.adv_estimator=gae")
        assert loaded.config.at(f"{role}.grad_clip") == 0.5
        assert "C608" not in codes(loaded)
        both = with_overrides(
            f"{role}.optim.clip_grad=0.5", f"{role}.grad_clip=2", "algorithm.adv_estimator=gae"
        )
        assert both.config.at(f"{role}.grad_clip") == 2
        assert "C608" in codes(both)


def test_defaults_of_the_objective_that_differ_are_those_that_conversion_adds() -> None:
    """Others of verl's defaults that differ select how something is computed, or are no values here."""
    own = load(None, ["trainer.nnodes=1"]).config
    differ = set()
    for name, fsdp, _ in TRAINERS:
        key = canonical(name, None)[0]
        if fsdp in "—…" or key not in keys() or not key.startswith(OBJECTIVE):
            continue
        value, default = json.loads(fsdp), keys()[key].default
        defaults = [list(each) if isinstance(each, tuple) else each for each in (default, own.at(key))]
        if value is not None and value not in defaults and not str(value).startswith("${"):
            differ.add(key)
    assert differ - NOT_OF_THE_OBJECTIVE == VERL_DEFAULTS.keys()
    assert all(own.at(key) != value for key, value in VERL_DEFAULTS.items())


OBJECTIVE = ("algorithm.", "actor_rollout_ref.actor.", "critic.")
NOT_OF_THE_OBJECTIVE = {
    "actor_rollout_ref.actor.checkpoint.async_save",
    "actor_rollout_ref.actor.fsdp_config.model_dtype",  # fp32, which is what null means
    "critic.model.fsdp_config.model_dtype",
    "critic.model.target_modules",  # a word, which is the list of it
    "critic.model.use_remove_padding",
    "actor_rollout_ref.actor.optim.min_lr_ratio",  # 0, which is what null means
    "critic.optim.min_lr_ratio",
    "algorithm.kl_ctrl.horizon",  # read only with an adaptive KL, which has to set both
    "algorithm.kl_ctrl.target_kl",
}
