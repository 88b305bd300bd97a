"""Do the batch sizes fit each other, the devices and the lengths of the sequences?"""

from collections.abc import Iterator
from dataclasses import dataclass

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.section import ENGINE

checks = Checks()

BATCH = "data.train_batch_size"
MINI_BATCH = "actor_rollout_ref.actor.ppo_mini_batch_size"
N = "actor_rollout_ref.rollout.n"
PROMPT, RESPONSE = "data.max_prompt_length", "data.max_response_length"
LENGTHS = (PROMPT, RESPONSE)
NODES, PER_NODE = "trainer.nnodes", "trainer.n_gpus_per_node"
ROLLOUT = "actor_rollout_ref.rollout"


@dataclass(frozen=True)
class Batching:
    """The keys that say how one role's sequences are put into micro-batches."""

    count: str
    dynamic: str
    budget: str

    @property
    def per_device(self) -> str:
        """The key that counts sequences on one device."""
        return f"{self.count}_per_gpu"


def _batching(section: str, prefix: str) -> Batching:
    stem = f"{section}.{prefix}"
    dynamic = f"{section}.use_dynamic_bsz" if prefix == "ppo_" else f"{stem}use_dynamic_bsz"
    return Batching(f"{stem}micro_batch_size", dynamic, f"{stem}max_token_len_per_gpu")


ROLES = (
    _batching("actor_rollout_ref.actor", "ppo_"),
    _batching("actor_rollout_ref.ref", "log_prob_"),
    _batching("actor_rollout_ref.rollout", "log_prob_"),
    _batching("critic", "ppo_"),
)


@checks.add("error", MINI_BATCH, BATCH)
def mini_batch_fits(view: View) -> str | None:
    """A step has at least one mini-batch, and whole ones."""
    batch, mini = view[BATCH], view[MINI_BATCH]
    if mini > batch:
        return f"a mini-batch of {mini} prompts does not fit in {BATCH} ({batch}); make it at most {batch}"
    if batch % mini:
        near = " or ".join(map(str, _divisors_around(batch, mini)))
        return f"{BATCH} ({batch}) does not divide into mini-batches of {mini} prompts; {near} would do"
    return None


@checks.add("error", BATCH, N, PER_NODE, NODES)
def batch_divides_over_devices(view: View) -> str | None:
    """Every device gets the same number of responses."""
    samples, devices = view[BATCH] * view[N], view.config.devices
    if samples % devices == 0:
        return None
    made_of = f"{BATCH} ({view[BATCH]}) × {N} ({view[N]})"
    return f"{made_of} makes {samples} responses, which do not divide over {_devices(view)}"


@checks.add("warning", MINI_BATCH, N, PER_NODE, NODES)
def no_device_is_idle(view: View) -> str | None:
    """A mini-batch has a response for every device."""
    samples, devices = view[MINI_BATCH] * view[N], view.config.devices
    if samples >= devices:
        return None
    return f"a mini-batch has {samples} responses; of {_devices(view)}, {devices - samples} have nothing to train on"


def _check_role(role: Batching) -> None:
    """The checks of one role's micro-batches."""

    @checks.add("error", role.count, role.per_device)
    def one_micro_batch_size(view: View) -> str | None:
        both = view.given(role.count) and view.given(role.per_device)
        if not both or view[role.count] is None or view[role.per_device] is None:
            return None
        return (
            f"it excludes {role.per_device}; keep that one, which does not change with the number of devices"
        )

    @checks.add("error", role.count, PER_NODE, NODES)
    def micro_batch_divides_over_devices(view: View) -> str | None:
        size, devices = view[role.count], view.config.devices
        if size is None or size % devices == 0 or view[role.per_device] is not None:
            return None
        return f"{size} sequences do not divide over {_devices(view)}; {role.per_device} counts on one device"

    @checks.add("warning", role.per_device, role.count, role.dynamic)
    def micro_batch_size_is_read(view: View) -> str | None:
        set_one = next((key for key in (role.per_device, role.count) if view.given(key) and view[key]), None)
        if set_one and view[role.dynamic]:
            return f"has no effect: {role.dynamic} fills micro-batches up to {role.budget} tokens"
        return None

    @checks.add("error", role.budget, role.dynamic, role.count, role.per_device, *LENGTHS)
    def budget_holds_a_sequence(view: View) -> str | None:
        budget, longest = view[role.budget], view[PROMPT] + view[RESPONSE]
        counted = view[role.count] or view[role.per_device]
        if budget >= longest or (counted and not view[role.dynamic]):
            return None
        whole = f"{longest} tokens ({' + '.join(LENGTHS)})"
        return f"a micro-batch of {budget} tokens cannot hold a whole sequence of {whole}"


for _role in ROLES:
    _check_role(_role)


@checks.add("error", f"{ROLLOUT}.prompt_length", PROMPT)
def prompt_lengths_agree(view: View) -> str | None:
    """Data and engine mean the same length of a prompt."""
    return _agree(view, f"{ROLLOUT}.prompt_length", PROMPT)


@checks.add("error", f"{ROLLOUT}.response_length", RESPONSE)
def response_lengths_agree(view: View) -> str | None:
    """Data and engine mean the same length of a response."""
    return _agree(view, f"{ROLLOUT}.response_length", RESPONSE)


@checks.add("error", f"{ROLLOUT}.max_model_len", ENGINE, *LENGTHS)
def engine_holds_a_sequence(view: View) -> str | None:
    """The engine can write a response of full length to a prompt of full length."""
    most, longest = view[f"{ROLLOUT}.max_model_len"], view[PROMPT] + view[RESPONSE]
    if view[ENGINE] != "vllm" or most is None or most >= longest:
        return None
    return f"{most} tokens cannot hold a whole sequence of {longest} ({' + '.join(LENGTHS)})"


@checks.add(
    "error", f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.enable_chunked_prefill", ENGINE, *LENGTHS
)
def engine_takes_a_prompt(view: View) -> str | None:
    """Without chunked prefill, the engine computes a whole sequence at a time."""
    most, longest = view[f"{ROLLOUT}.max_num_batched_tokens"], view[PROMPT] + view[RESPONSE]
    if view[ENGINE] != "vllm" or view[f"{ROLLOUT}.enable_chunked_prefill"] or most >= longest:
        return None
    return f"without enable_chunked_prefill it has to hold a whole sequence, {longest} tokens, and is {most}"


def _agree(view: View, engine: str, data: str) -> str | None:
    if view[engine] == view[data]:
        return None
    return (
        f"{view[engine]} contradicts {data} ({view[data]}), which it follows when left out; set only {data}"
    )


def _devices(view: View) -> str:
    devices = view.config.devices
    return f"{devices} device{'s' * (devices > 1)} ({NODES} × {PER_NODE})"


def _divisors_around(number: int, near: int) -> Iterator[int]:
    yield max(d for d in range(1, near + 1) if number % d == 0)
    yield min(d for d in range(near, number + 1) if number % d == 0)
