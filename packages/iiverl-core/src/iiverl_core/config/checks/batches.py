"""Checks of batch sizes: against each other, the devices and the lengths of sequences."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.interpolation import reference
from iiverl_core.config.model_facts import read_positions
from iiverl_core.config.roles import ROLE_KEYS, MicroBatchKeys, Role
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.section import ENGINE
from iiverl_core.registry import ENGINES

checks = Checks()

BATCH = "data.train_batch_size"
MINI_BATCH = "actor_rollout_ref.actor.ppo_mini_batch_size"
MINI_BATCHES: dict[Role, str] = {
    role: f"{role_keys.section}.ppo_mini_batch_size"
    for role, role_keys in ROLE_KEYS.items()
    if role_keys.training
}
N = "actor_rollout_ref.rollout.n"
PROMPT, RESPONSE = "data.max_prompt_length", "data.max_response_length"
LENGTHS = (PROMPT, RESPONSE)
NODES, PER_NODE = "trainer.nnodes", "trainer.n_gpus_per_node"
ROLLOUT = "actor_rollout_ref.rollout"
REWARD, REWARD_LENGTH = ROLE_KEYS["reward"].model, "reward_model.max_length"
COPY = tuple(
    f"actor_rollout_ref.actor.megatron.{kind}_parallel_size"
    for kind in ("tensor_model", "pipeline_model", "context")
)
"""Keys whose product is the number of devices that share one copy of a split model."""
SPLITS = tuple(ROLE_KEYS[role].sequence_split for role in MINI_BATCHES)


@dataclass(frozen=True)
class Batching:
    """The keys that bound the micro-batches of a role; sequences longer than the key `bound` are truncated."""

    role: Role
    by: MicroBatchKeys
    bound: str | None

    @property
    def keys(self) -> tuple[str, ...]:
        """Everything that the micro-batches depend on, the budget first."""
        bound = (self.bound,) if self.bound else ()
        by, role = self.by, ROLE_KEYS[self.role]
        return by.tokens, by.dynamic, by.sequences, by.per_device, *bound, role.sequence_split, *role.decides

    @property
    def followed(self) -> str | None:
        """The key whose value is the default of the budget."""
        return reference(keys()[self.by.tokens].default)


BATCHINGS = tuple(
    Batching(role, by, "reward_model.max_length" if role == "reward" else None)
    for role, role_keys in ROLE_KEYS.items()
    for by in (role_keys.training, role_keys.forward)
    if by
)


def _check_mini_batch(role: Role, key: str) -> None:
    @checks.add("C101", "error", key, BATCH, role=role)
    def mini_batch_fits(view: ConfigView) -> str | None:
        batch, mini = view[BATCH], view[key]
        if key != MINI_BATCH and not view.is_set(key):  # it follows MINI_BATCH
            return None
        if mini > batch:
            return f"{key} ({mini}) is larger than {BATCH} ({batch}); set it to at most {batch}"
        if batch % mini:
            near = " or ".join(map(str, _divisors_around(batch, mini)))
            return f"{BATCH} ({batch}) is not divisible by {key} ({mini}); use {near}"
        return None


for _role, _key in MINI_BATCHES.items():
    _check_mini_batch(_role, _key)


@checks.add("C102", "error", BATCH, N, PER_NODE, NODES, *SPLITS)
def _batch_divides_over_devices(view: ConfigView) -> str | None:
    samples, ranks = view[BATCH] * view[N], _most_ranks(view)
    if samples % ranks == 0:
        return None
    step = ranks // gcd(ranks, view[N])
    return (
        f"{samples} responses ({BATCH} × {N}: {view[BATCH]} × {view[N]}) cannot be divided evenly among {_places(view, ranks)}; "
        f"set {BATCH} to a multiple of {step}"
    )


@checks.add("C103", "warning", MINI_BATCH, N, PER_NODE, NODES, *SPLITS)
def _no_device_is_idle(view: ConfigView) -> str | None:
    samples, ranks = view[MINI_BATCH] * view[N], _most_ranks(view)
    if samples >= ranks:
        return None
    return f"some of {_places(view, ranks)} are idle: a mini-batch has only {samples} responses ({MINI_BATCH} × {N})"


def _check_micro_batches(role: Role, by: MicroBatchKeys) -> None:
    @checks.add("C104", "error", by.sequences, by.per_device, role=role)
    def one_micro_batch_size(view: ConfigView) -> str | None:
        if not view.is_set(by.sequences) or view[by.sequences] is None or view[by.per_device] is None:
            return None
        if not view.is_set(by.per_device):
            followed = reference(keys()[by.per_device].default)
            return f"cannot be combined with {by.per_device}, which follows {followed}; set {by.per_device} instead"
        return f"cannot be combined with {by.per_device}; keep that one, which fits any number of devices"

    split = ROLE_KEYS[role].sequence_split

    @checks.add("C105", "error", by.sequences, PER_NODE, NODES, by.dynamic, *COPY, split, role=role)
    def micro_batch_divides_over_devices(view: ConfigView) -> str | None:
        size, ranks = view[by.sequences], view.config.data_ranks(role)
        if size is None or size % ranks == 0 or view[by.per_device] is not None:
            return None
        if view[by.dynamic] or not view.is_set(
            by.sequences
        ):  # it is not read, or the key that it follows is reported
            return None
        where = _places(view, ranks)
        return f"{size} sequences cannot be divided evenly among {where}; set {by.per_device}, which counts per device"

    @checks.add("C106", "warning", by.per_device, by.sequences, by.dynamic, role=role)
    def micro_batch_size_is_read(view: ConfigView) -> str | None:
        set_one = next((key for key in (by.per_device, by.sequences) if view.is_set(key) and view[key]), None)
        if set_one and view[by.dynamic]:
            return f"has no effect: with {by.dynamic}, micro-batches are filled up to {by.tokens}"
        return None


for _batching in BATCHINGS:
    _check_micro_batches(_batching.role, _batching.by)


@checks.add(
    "C107", "error", *(b.by.tokens for b in BATCHINGS), *LENGTHS, *(key for b in BATCHINGS for key in b.keys)
)
def _budgets_hold_a_sequence(view: ConfigView) -> str | None:
    small = [b for b in BATCHINGS if _budget(view, b) < _longest(view, b) and _fills_budget(view, b)]
    budgets = {b.by.tokens for b in small}
    small = [b for b in small if b.followed not in budgets or view.is_set(b.by.tokens)]
    if not small:
        return None
    longest = _longest(view, small[0])
    made_of = " + ".join(LENGTHS) if longest == view[PROMPT] + view[RESPONSE] else small[0].bound
    limits = " and ".join(f"{b.by.tokens} ({view[b.by.tokens]})" for b in small)
    return (
        f"{limits} cannot hold a sequence of {longest} tokens ({made_of}); raise {'it' if len(small) == 1 else 'them'}, "
        f"or set {small[0].by.per_device} instead"
    )


def _budget(view: ConfigView, batching: Batching) -> int:
    """Return the tokens of a micro-batch on all devices that share its sequences."""
    return view[batching.by.tokens] * view.config.sequence_split(batching.role)


def _longest(view: ConfigView, batching: Batching) -> int:
    longest = view[PROMPT] + view[RESPONSE]
    return min(longest, (view[batching.bound] if batching.bound else None) or longest)


def _fills_budget(view: ConfigView, batching: Batching) -> bool:
    by = batching.by
    return view.uses(batching.role) and (
        view[by.dynamic] or (view[by.sequences] is None and view[by.per_device] is None)
    )


def _check_length(engine: str, data: str) -> None:
    @checks.add("C108", "error", engine, data)
    def lengths_agree(view: ConfigView) -> str | None:
        if view[engine] == view[data]:
            return None
        return f"{view[engine]} differs from {data} ({view[data]}); leave it out to follow {data}"


_check_length(f"{ROLLOUT}.prompt_length", PROMPT)
_check_length(f"{ROLLOUT}.response_length", RESPONSE)


@checks.add("C109", "error", f"{ROLLOUT}.max_model_len", ENGINE, *LENGTHS)
def _engine_holds_a_sequence(view: ConfigView) -> str | None:
    most, longest = view[f"{ROLLOUT}.max_model_len"], view[PROMPT] + view[RESPONSE]
    if "max_model_len" not in ENGINES[view[ENGINE]].reads or most is None or most >= longest:
        return None
    return f"{most} is below the {longest} tokens of the longest sequence ({' + '.join(LENGTHS)}); raise it, or leave it out"


@checks.add(
    "C110",
    "error",
    f"{ROLLOUT}.max_num_batched_tokens",
    f"{ROLLOUT}.enable_chunked_prefill",
    ENGINE,
    *LENGTHS,
)
def _engine_takes_a_prompt(view: ConfigView) -> str | None:
    """Without chunked prefill, the engine computes a whole sequence at a time."""
    most, longest = view[f"{ROLLOUT}.max_num_batched_tokens"], view[PROMPT] + view[RESPONSE]
    reads = {"max_num_batched_tokens", "enable_chunked_prefill"} <= set(ENGINES[view[ENGINE]].reads)
    if not reads or view[f"{ROLLOUT}.enable_chunked_prefill"] or most >= longest:
        return None
    batched = f"{ROLLOUT}.max_num_batched_tokens ({most})"
    return f"without enable_chunked_prefill, {batched} must be at least {longest}, the longest sequence; raise it, or leave it out"


@checks.add("C111", "error", f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs", ENGINE)
def _engine_takes_all_sequences(view: ConfigView) -> str | None:
    """vLLM computes at least one token of each sequence at a time."""
    most, sequences = view[f"{ROLLOUT}.max_num_batched_tokens"], view[f"{ROLLOUT}.max_num_seqs"]
    if "max_num_batched_tokens" not in ENGINES[view[ENGINE]].reads or most >= sequences:
        return None
    return f"{ROLLOUT}.max_num_batched_tokens ({most}) is below {ROLLOUT}.max_num_seqs ({sequences}); leave one of them out to follow the other"


def _check_positions(role: Role) -> None:
    model = ROLE_KEYS[role].model
    path, override = f"{model}.path", f"{model}.override_config"

    @checks.add("C112", "error", RESPONSE, PROMPT, path, override, role=role)
    def positions_hold_a_sequence(view: ConfigView) -> str | None:
        longest, most = view[PROMPT] + view[RESPONSE], read_positions(view[path], view[override])
        if most is None or longest <= most:
            return None
        return (
            f"a sequence has up to {longest} tokens ({' + '.join(LENGTHS)}), and the model {view[path]} has {most} positions "
            "(max_position_embeddings); lower the lengths"
        )


_check_positions("actor")
_check_positions("critic")


@checks.add("C113", "error", REWARD_LENGTH, f"{REWARD}.path", f"{REWARD}.override_config", role="reward")
def _positions_hold_a_conversation(view: ConfigView) -> str | None:
    longest = view[REWARD_LENGTH]
    most = read_positions(view[f"{REWARD}.path"], view[f"{REWARD}.override_config"])
    if longest is None or most is None or longest <= most:
        return None
    return (
        f"the model {view[f'{REWARD}.path']} has {most} positions (max_position_embeddings), fewer than {longest}; "
        "lower it"
    )


def _devices(view: ConfigView) -> str:
    return f"{view.config.devices} devices ({NODES} × {PER_NODE})"


def _most_ranks(view: ConfigView) -> int:
    """Return the most data-parallel ranks of any trained model; all devices, if the backend splits models."""
    if view.config.splits_models:
        return view.config.devices
    return max(view.config.data_ranks(role) for role in MINI_BATCHES if view.uses(role))


def _places(view: ConfigView, ranks: int) -> str:
    if ranks == view.config.devices:
        return _devices(view)
    if view.config.splits_models:
        return f"{ranks} copies of the model on {_devices(view)}"
    return f"{ranks} groups of devices that share sequences (ulysses_sequence_parallel_size), on {_devices(view)}"


def _divisors_around(number: int, near: int) -> Iterator[int]:
    yield max(d for d in range(1, near + 1) if number % d == 0)
    yield min(d for d in range(near, number + 1) if number % d == 0)
