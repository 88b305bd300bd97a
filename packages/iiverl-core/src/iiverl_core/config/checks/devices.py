"""Is there a backend, and do the devices add up?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.model_facts import read_model_facts
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.section import BACKEND, ENGINE
from iiverl_core.config.vllm_version import CPU_HEAD_SIZES, built_for_cpu
from iiverl_core.installation import install_command
from iiverl_core.registry import BACKENDS, ENGINES, TRACKERS

checks = Checks()

RUNTIME, NODES, PER_NODE = "trainer.runtime", "trainer.nnodes", "trainer.n_gpus_per_node"
MODEL, OVERRIDE = "actor_rollout_ref.model.path", "actor_rollout_ref.model.override_config"
ROLLOUT_DEVICES = "trainer.rollout_devices"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"


@checks.add("C701", "here", BACKEND)
def backend_is_installed(view: View) -> str | None:
    """The backend is there."""
    return BACKENDS[view.config.backend].missing()


@checks.add("C702", "here", ENGINE)
def engine_is_installed(view: View) -> str | None:
    """The rollout engine is there, and one of those that are supported."""
    return ENGINES[view[ENGINE]].missing()


@checks.add("C709", "here", MODEL, OVERRIDE, ENGINE)
def engine_computes_the_heads(view: View) -> str | None:
    """vLLM on a CPU has code for heads of the model's size."""
    if view[ENGINE] != "vllm" or not built_for_cpu():
        return None
    facts = read_model_facts(view[MODEL], view[OVERRIDE])
    if facts is None or facts.head_dim in CPU_HEAD_SIZES:
        return None
    sizes = ", ".join(map(str, CPU_HEAD_SIZES))
    return (
        f"vLLM on a CPU cannot run the model {view[MODEL]}: its attention heads are {facts.head_dim} wide, and there have "
        f"to be {sizes}; set {ENGINE} to hf"
    )


@checks.add("C703", "here", "trainer.logger")
def trackers_are_installed(view: View) -> str | None:
    """Every tracker's package is there."""
    trackers = [TRACKERS[name] for name in dict.fromkeys(view["trainer.logger"])]
    absent = [tracker.package for tracker in trackers if tracker.package and tracker.missing()]
    if not absent:
        return None
    are = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {are} not installed; install with: {install_command(*absent)}"


@checks.add("C704", "error", RUNTIME, PER_NODE, NODES)
def local_runs_on_one_device(view: View) -> str | None:
    """Without Ray there is one process."""
    if view[RUNTIME] != "local" or view.config.devices == 1:
        return None
    return f"one process runs on one device, not {view.config.devices}; set {PER_NODE}: 1 and {NODES}: 1"


@checks.add("C705", "error", ROLLOUT_DEVICES, RUNTIME)
def local_has_no_other_devices(view: View) -> str | None:
    """Without Ray there is one process, which trains and generates."""
    if view[ROLLOUT_DEVICES] is None or view[RUNTIME] != "local":
        return None
    return f"engines on devices of their own are other processes; leave it out, or set {RUNTIME}: ray"


def _check_fsdp_size(role: Role, key: str) -> None:
    @checks.add("C706", "here", key, PER_NODE, NODES, role=role)
    def one_copy_over_all(view: View) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.splits_models or size in (-1, devices) or size < 1 or devices % size:
            return None
        return f"not in this version: copies of the model over {size} of {devices} devices; set it to -1"

    @checks.add("C707", "error", key, PER_NODE, NODES, role=role)
    def copies_divide_over_devices(view: View) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.splits_models or size == -1 or (size > 0 and devices % size == 0):
            return None
        return f"{devices} devices ({NODES} × {PER_NODE}) do not divide into groups of {size}; -1 takes all"


for _role, _keys in ROLE_KEYS.items():
    _check_fsdp_size(_role, f"{_keys.fsdp}.fsdp_size")


@checks.add("C708", "error", TENSOR_PARALLEL, ENGINE, PER_NODE, NODES, ROLLOUT_DEVICES)
def engines_divide_over_devices(view: View) -> str | None:
    """Each engine gets its share of the devices."""
    size, apart = view[TENSOR_PARALLEL], view[ROLLOUT_DEVICES]
    devices = view.config.devices if apart is None else apart
    if not ENGINES[view[ENGINE]].spans_devices or devices % size == 0:
        return None
    where = f"{NODES} × {PER_NODE}" if apart is None else ROLLOUT_DEVICES
    return f"{devices} devices ({where}) do not divide into engines of {size} ({TENSOR_PARALLEL})"
