"""A run by roles: what is read from which key, and that it says what the configuration says."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.config import Loaded, MicroBatching, RoleConfig, RunConfig, load
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.schema import keys, sections

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("examples/*/*.yaml"), *ROOT.glob("tests/config/*.yaml")])
BACKENDS = ("fsdp", "megatron")
ALL_ROLES = (
    "algorithm.adv_estimator=gae",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "reward_model.enable=true",
    "trainer.n_gpus_per_node=8",
)
FORWARD = {"forward.sequences": 3, "forward.tokens": 100_003}
BOTH = {"model.path": "/models/own", "model.override_config": {"a": 1}, "offload.parameters": True, **FORWARD}
TRAINING = {
    "offload.optimizer": True,
    "training.optimizer.lr": 0.125,
    "training.grad_clip": 7.5,
    "training.micro_batching.sequences": 5,
    "training.micro_batching.tokens": 100_005,
    "training.mini_batch_size": 16,
    "training.epochs": 9,
}
OF_BACKEND: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel.model_dtype": "fp16", "offload.optimizer": True},
    "megatron": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": False},
}


def test_fsdps_name_for_offloading_offloads_all(tmp_path: Path) -> None:
    key = "actor_rollout_ref.actor.fsdp_config.offload_policy"
    for backend, away in (("fsdp", True), ("megatron", False)):
        offload = loaded_with(tmp_path, backend, f"{key}=true").run.actor.offload
        assert (offload.parameters, offload.optimizer) == (away, away)


def test_a_profile_needs_a_tool_steps_and_a_process(tmp_path: Path) -> None:
    on = "actor_rollout_ref.actor.profiler.enable=true"
    which = "global_profiler.tool=torch", "global_profiler.steps=3"
    assert loaded_with(tmp_path, "fsdp", on).run.profile is None
    assert loaded_with(tmp_path, "fsdp", *which).run.profile is None
    profile = loaded_with(tmp_path, "fsdp", on, *which).run.profile
    assert profile
    assert (profile.steps, profile.ranks, profile.contents) == ({3}, {0}, {"cpu", "cuda"})
    every = loaded_with(tmp_path, "fsdp", on, *which, "actor_rollout_ref.actor.profiler.all_ranks=true")
    assert every.run.profile and every.run.profile.ranks is None


def loaded_with(tmp_path: Path, backend: str, *overrides: str) -> Loaded:
    file = tmp_path / "run.yaml"
    file.write_text("")
    return load(file, overrides, backend)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def settings(role: RoleConfig, backend: str) -> dict[str, Any]:
    """Every setting of a role that has a key, each with a value that no other has and that is no default."""
    trained = TRAINING if role.training else {}
    gradients = {"offload.gradients": True} if role.training and backend == "megatron" else {}
    shuffled = {"training.shuffle": not role.training.shuffle} if role.training else {}
    return {**BOTH, **trained, **OF_BACKEND[backend], **gradients, **shuffled}


def value(role: RoleConfig, name: str) -> Any:
    found: Any = role
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", ROLE_KEYS)
def test_a_setting_is_read_from_the_key_that_is_named_for_it(
    name: Role, backend: str, tmp_path: Path
) -> None:
    role = loaded_with(tmp_path, backend, *ALL_ROLES).run.roles[name]
    wanted = settings(role, backend)
    assert all(value(role, setting) != wanted[setting] for setting in wanted)
    overrides = [f"{role.key(setting)}={_yaml(wanted[setting])}" for setting in wanted]
    loaded = loaded_with(tmp_path, backend, *ALL_ROLES, *overrides)
    changed = loaded.run.roles[name]
    assert {setting: value(changed, setting) for setting in wanted} == wanted
    assert changed.key("model.path") == role.key("model.path")


def _yaml(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def test_what_has_no_key_is_not_named(backend: str, tmp_path: Path) -> None:
    run = loaded_with(tmp_path, backend, *ALL_ROLES).run
    for name in ("training.epochs", "offload.gradients", "no_such"):
        with pytest.raises(KeyError):
            run.roles["reference"].key(name)


def test_the_table_of_keys_names_keys_and_sections() -> None:
    for table in ROLE_KEYS.values():
        assert {table.section, table.model, table.fsdp, table.megatron} <= sections().keys()
        for bounds in filter(None, (table.forward, table.training)):
            assert {bounds.sequences, bounds.per_device, bounds.dynamic, bounds.tokens} <= keys().keys()
        assert set(table.decides) <= keys().keys()


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["algorithm.adv_estimator=grpo"], ["actor", "reference"]),
        (["algorithm.adv_estimator=grpo", "algorithm.use_kl_in_reward=false"], ["actor"]),
        (["algorithm.adv_estimator=gae", "algorithm.kl_ctrl.kl_coef=0"], ["actor", "critic"]),
        (["algorithm.use_kl_in_reward=false", "reward_model.enable=true"], ["actor", "critic", "reward"]),
    ],
)
def test_a_run_has_the_models_that_something_reads(
    overrides: list[str], roles: list[Role], tmp_path: Path
) -> None:
    run = loaded_with(tmp_path, "fsdp", *overrides).run
    assert list(run.roles) == roles
    assert (run.needs_reference, run.uses_critic, run.uses_reward_model) == (
        "reference" in roles,
        "critic" in roles,
        "reward" in roles,
    )
    assert (run.rewards.conversation is not None) == run.uses_reward_model


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], MicroBatching(None, 16384)),
        (["ppo_micro_batch_size_per_gpu=3"], MicroBatching(3, 16384)),
        (["ppo_micro_batch_size=16"], MicroBatching(4, 16384)),  # over four copies on eight devices
        (["ppo_micro_batch_size=2"], MicroBatching(1, 16384)),
        (["ppo_micro_batch_size=16", "use_dynamic_bsz=true"], MicroBatching(None, 16384)),
    ],
)
def test_micro_batches_are_counted_on_one_rank(
    overrides: list[str], expected: MicroBatching, tmp_path: Path
) -> None:
    actor = "actor_rollout_ref.actor"
    made = [f"{actor}.{override}" for override in ["megatron.tensor_model_parallel_size=2", *overrides]]
    run = loaded_with(tmp_path, "megatron", *ALL_ROLES, *made).run
    assert run.actor.data_ranks == 4
    assert run.actor.training and run.actor.training.micro_batching == expected


def test_devices_that_share_sequences_add_up_their_budgets(tmp_path: Path) -> None:
    split = "ulysses_sequence_parallel_size"
    overrides = [f"actor_rollout_ref.actor.{split}=4", "critic.ppo_micro_batch_size=8", f"critic.{split}=2"]
    run = loaded_with(tmp_path, "fsdp", *ALL_ROLES, *overrides).run
    roles = {name: (role.sequence_split, role.data_ranks) for name, role in run.roles.items()}
    assert roles == {"actor": (4, 2), "reference": (4, 2), "critic": (2, 4), "reward": (1, 8)}
    assert run.training("actor").micro_batching == MicroBatching(None, 4 * 16384)
    assert run.training("critic").micro_batching == MicroBatching(2, 2 * 32768)
    assert run.roles["critic"].key("sequence_split") == f"critic.{split}"


def test_losses_are_those_of_actor_and_critic(tmp_path: Path) -> None:
    actor = "actor_rollout_ref.actor"
    set_to: dict[str, tuple[str, Any]] = {
        "policy_loss": (f"{actor}.policy_loss.loss_mode", "gspo"),
        "clip_low": (f"{actor}.clip_ratio_low", 0.11),
        "clip_high": (f"{actor}.clip_ratio_high", 0.12),
        "clip_dual": (f"{actor}.clip_ratio_c", 13.0),
        "clip_cov_ratio": (f"{actor}.policy_loss.clip_cov_ratio", 0.14),
        "clip_cov_lb": (f"{actor}.policy_loss.clip_cov_lb", 0.15),
        "clip_cov_ub": (f"{actor}.policy_loss.clip_cov_ub", 16.0),
        "kl_cov_ratio": (f"{actor}.policy_loss.kl_cov_ratio", 0.17),
        "ppo_kl_coef": (f"{actor}.policy_loss.ppo_kl_coef", 0.18),
        "tau_pos": (f"{actor}.tau_pos", 0.19),
        "tau_neg": (f"{actor}.tau_neg", 0.21),
        "loss_agg_mode": (f"{actor}.loss_agg_mode", "token-sum"),
        "max_tokens_norm": (f"{actor}.loss_scale_factor", 22.0),
        "entropy_coeff": (f"{actor}.entropy_coeff", 0.23),
        "use_kl_loss": (f"{actor}.use_kl_loss", True),
        "kl_loss_coef": (f"{actor}.kl_loss_coef", 0.24),
        "kl_loss_type": (f"{actor}.kl_loss_type", "mse"),
        "value_clip": ("critic.cliprange_value", 0.25),
    }
    overrides = [f"{key}={_yaml(value)}" for key, value in set_to.values()]
    loss = loaded_with(tmp_path, "fsdp", *overrides).run.loss
    assert vars(loss) == {name: value for name, (_, value) in set_to.items()}
    default = loaded_with(tmp_path, "fsdp", "data.max_response_length=77").run.loss
    assert default.max_tokens_norm == 77


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("asked", [None, "megatron"])
def test_a_run_says_what_its_file_says(file: Path, asked: str | None) -> None:
    loaded = load(file, backend=asked)
    config, run = loaded.config, loaded.run
    assert isinstance(run, RunConfig) and loaded.run is run
    assert pickle.loads(pickle.dumps(run)) == run
    same = (
        "backend",
        "devices",
        "engine_devices",
        "kl_in_reward",
        "needs_reference",
        "uses_critic",
    )
    assert all(getattr(run, name) == getattr(config, name) for name in same)
    assert next(iter(run.roles)) == "actor"
    assert all(role.data_ranks == config.data_ranks(name) for name, role in run.roles.items())
    assert all(
        role.default_dtype == ("fp32" if role.training and not role.model.lora_rank else "bf16")
        for role in run.roles.values()
    )
