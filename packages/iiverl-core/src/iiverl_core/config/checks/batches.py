"""Do the batch sizes fit each other, the devices and the lengths of the sequences?"""

from collections.abc import Iterator
from dataclasses import dataclass

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.interpolation import reference
from iiverl_core.config.roles import ROLE_KEYS, Role
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
COPY = tuple(
    f"actor_rollout_ref.actor.megatron.{kind}_parallel_size"
    for kind in ("tensor_model", "pipeline_model", "context")
)
"""Keys whose product is the devices that Megatron spreads one copy of a model over."""


@dataclass(frozen=True)
class Batching:
    """The keys that say how one model's sequences are put into micro-batches; `bound` cuts longer sequences off."""

    role: Role
    count: str
    dynamic: str
    budget: str
    bound: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All that it depends on, the budget first."""
        bound = (self.bound,) if self.bound else ()
        return self.budget, self.dynamic, self.count, self.per_device, *bound, *ROLE_KEYS[self.role].decides

    @property
    def followed(self) -> str | None:
        """The budget that is its own where it has none."""
        return reference(keys()[self.budget].default)

    @property
    def per_device(self) -> str:
        """The key that counts sequences on one device."""
        return f"{self.count}_per_gpu"


ROLES = tuple(
    Batching(
        role, by.sequences, by.dynamic, by.tokens, "reward_model.max_length" if role == "reward" else None
    )
    for role, role_keys in ROLE_KEYS.items()
    for by in (role_keys.training, role_keys.forward)
    if by
)


def _check_mini_batch(role: Role, key: str) -> None:
    @checks.add("C101", "error", key, BATCH, role=role)
    def mini_batch_fits(view: View) -> str | None:
        batch, mini = view[BATCH], view[key]
        if key != MINI_BATCH and not view.given(key):  # it follows MINI_BATCH
            return None
        if mini > batch:
            return f"{key} ({mini}) is above {BATCH} ({batch}); make it at most {batch}"
        if batch % mini:
            near = " or ".join(map(str, _divisors_around(batch, mini)))
            return f"{BATCH} ({batch}) does not divide into mini-batches of {mini} ({key}); use {near}"
        return None


for _role, _key in MINI_BATCHES.items():
    _check_mini_batch(_role, _key)


@checks.add("C102", "error", BATCH, N, PER_NODE, NODES)
def batch_divides_over_devices(view: View) -> str | None:
    """Every device gets the same number of responses."""
    samples, devices = view[BATCH] * view[N], view.config.devices
    if samples % devices == 0:
        return None
    return f"{view[BATCH]} × {view[N]} responses ({BATCH} × {N}) do not divide over {_devices(view)}"


@checks.add("C103", "warning", MINI_BATCH, N, PER_NODE, NODES)
def no_device_is_idle(view: View) -> str | None:
    """A mini-batch has a response for every device."""
    samples, devices = view[MINI_BATCH] * view[N], view.config.devices
    if samples >= devices:
        return None
    return f"a mini-batch of {samples} responses ({MINI_BATCH} × {N}) leaves some of {_devices(view)} idle"


def _check_micro_batches(role: Batching) -> None:
    """The checks of one model's micro-batches."""

    @checks.add("C104", "error", role.count, role.per_device, role=role.role)
    def one_micro_batch_size(view: View) -> str | None:
        if not view.given(role.count) or view[role.count] is None or view[role.per_device] is None:
            return None
        if not view.given(role.per_device):
            followed = reference(keys()[role.per_device].default)
            return f"{role.per_device} already counts on one device, as {followed} does; set that one instead"
        return (
            f"this and {role.per_device} exclude each other; keep that one, which fits any number of devices"
        )

    @checks.add("C105", "error", role.count, PER_NODE, NODES, role.dynamic, *COPY, role=role.role)
    def micro_batch_divides_over_devices(view: View) -> str | None:
        size, ranks = view[role.count], view.config.data_ranks
        if size is None or size % ranks == 0 or view[role.per_device] is not None:
            return None
        if view[role.dynamic] or not view.given(role.count):  # it is not read, or what it follows is told
            return None
        where = (
            _devices(view)
            if ranks == view.config.devices
            else f"{ranks} copies of the model on {_devices(view)}"
        )
        return f"{size} sequences do not divide over {where}; {role.per_device} counts on one device"

    @checks.add("C106", "warning", role.per_device, role.count, role.dynamic, role=role.role)
    def micro_batch_size_is_read(view: View) -> str | None:
        set_one = next((key for key in (role.per_device, role.count) if view.given(key) and view[key]), None)
        if set_one and view[role.dynamic]:
            return f"has no effect: {role.dynamic} fills micro-batches up to {role.budget}"
        return None


for _batching_keys in ROLES:
    _check_micro_batches(_batching_keys)


@checks.add(
    "C107", "error", *(role.budget for role in ROLES), *LENGTHS, *(key for role in ROLES for key in role.keys)
)
def budgets_hold_a_sequence(view: View) -> str | None:
    """Where micro-batches are filled to a budget of tokens, the longest sequence fits."""
    small = [role for role in ROLES if view[role.budget] < _longest(view, role) and _by_tokens(view, role)]
    budgets = {role.budget for role in small}
    small = [role for role in small if role.followed not in budgets or view.given(role.budget)]
    if not small:
        return None
    longest = _longest(view, small[0])
    made_of = " + ".join(LENGTHS) if longest == view[PROMPT] + view[RESPONSE] else small[0].bound
    told = ", ".join(f"{role.budget} ({view[role.budget]})" for role in small)
    whole = f"{longest} tokens ({made_of})"
    return (
        f"{told} cannot hold a sequence of {whole}; raise it, or count sequences with {small[0].per_device}"
    )


def _longest(view: View, role: Batching) -> int:
    longest = view[PROMPT] + view[RESPONSE]
    return min(longest, (view[role.bound] if role.bound else None) or longest)


def _by_tokens(view: View, role: Batching) -> bool:
    if not view.uses(role.role):
        return False
    return view[role.dynamic] or (view[role.count] is None and view[role.per_device] is None)


def _check_length(engine: str, data: str) -> None:
    @checks.add("C108", "error", engine, data)
    def lengths_agree(view: View) -> str | None:
        if view[engine] == view[data]:
            return None
        return f"{view[engine]} contradicts {data} ({view[data]}), which it follows when left out; set only {data}"


_check_length(f"{ROLLOUT}.prompt_length", PROMPT)
_check_length(f"{ROLLOUT}.response_length", RESPONSE)


@checks.add("C109", "error", f"{ROLLOUT}.max_model_len", ENGINE, *LENGTHS)
def engine_holds_a_sequence(view: View) -> str | None:
    """The engine can write a response of full length to a prompt of full length."""
    most, longest = view[f"{ROLLOUT}.max_model_len"], view[PROMPT] + view[RESPONSE]
    if "max_model_len" not in ENGINES[view[ENGINE]].reads or most is None or most >= longest:
        return None
    return f"{most} tokens cannot hold a sequence of {longest} ({' + '.join(LENGTHS)})"


@checks.add(
    "C110",
    "error",
    f"{ROLLOUT}.max_num_batched_tokens",
    f"{ROLLOUT}.enable_chunked_prefill",
    ENGINE,
    *LENGTHS,
)
def engine_takes_a_prompt(view: View) -> str | None:
    """Without chunked prefill, the engine computes a whole sequence at a time."""
    most, longest = view[f"{ROLLOUT}.max_num_batched_tokens"], view[PROMPT] + view[RESPONSE]
    reads = {"max_num_batched_tokens", "enable_chunked_prefill"} <= set(ENGINES[view[ENGINE]].reads)
    if not reads or view[f"{ROLLOUT}.enable_chunked_prefill"] or most >= longest:
        return None
    batched = f"{ROLLOUT}.max_num_batched_tokens ({most})"
    return f"without enable_chunked_prefill, {batched} has to hold a whole sequence of {longest} tokens"


@checks.add("C111", "error", f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs", ENGINE)
def engine_takes_all_sequences(view: View) -> str | None:
    """vLLM computes at least one token of each sequence at a time."""
    most, sequences = view[f"{ROLLOUT}.max_num_batched_tokens"], view[f"{ROLLOUT}.max_num_seqs"]
    if "max_num_batched_tokens" not in ENGINES[view[ENGINE]].reads or most >= sequences:
        return None
    return f"{ROLLOUT}.max_num_batched_tokens ({most}) is below {ROLLOUT}.max_num_seqs ({sequences}); set one of them"


def _devices(view: View) -> str:
    return f"{view.config.devices} devices ({NODES} × {PER_NODE})"


def _divisors_around(number: int, near: int) -> Iterator[int]:
    yield max(d for d in range(1, near + 1) if number % d == 0)
    yield min(d for d in range(near, number + 1) if number % d == 0)
