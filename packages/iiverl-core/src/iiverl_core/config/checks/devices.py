"""Is there a backend, and do the devices add up?"""

import importlib.metadata
import importlib.util

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.section import BACKEND, ENGINE

checks = Checks()

RUNTIME, NODES, PER_NODE = "trainer.runtime", "trainer.nnodes", "trainer.n_gpus_per_node"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
FSDP_SIZES = tuple(f"actor_rollout_ref.{role}.fsdp_config.fsdp_size" for role in ("actor", "ref"))
TRACKERS = ("wandb", "mlflow", "swanlab")


def installed_backends() -> set[str]:
    """Names under which installed packages offer a training backend."""
    return {entry.name for entry in importlib.metadata.entry_points(group="iiverl.backends")}


def _backend_is_installed(view: View) -> str | None:
    backend = view.config.backend
    if backend in installed_backends():
        return None
    if backend == "megatron":
        return "the backend megatron is not in this version; use fsdp"
    return f"the backend {backend} is not installed; this installs it: pip install 'iiverl[{backend}]'"


@checks.add("here", BACKEND)
def backend_is_installed(view: View) -> str | None:
    """The file's backend is there."""
    return None if view.backend else _backend_is_installed(view)


@checks.add("error", BACKEND)
def asked_backend_is_installed(view: View) -> str | None:
    """The backend that was asked for on the command line is there."""
    return _backend_is_installed(view) if view.backend else None


@checks.add("here", "trainer.logger")
def trackers_are_installed(view: View) -> str | None:
    """Every tracker's package is there."""
    absent = [
        name for name in view["trainer.logger"] if name in TRACKERS and not importlib.util.find_spec(name)
    ]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed; this installs it: pip install {' '.join(absent)}"


@checks.add("error", RUNTIME, PER_NODE, NODES)
def local_runs_on_one_device(view: View) -> str | None:
    """Without Ray there is one process."""
    if view[RUNTIME] != "local" or view.config.devices == 1:
        return None
    return f"one process runs on one device, not {view.config.devices}; set {PER_NODE}: 1 and {NODES}: 1"


def _check_fsdp_size(key: str) -> None:
    @checks.add("here", key, PER_NODE, NODES)
    def one_copy_over_all(view: View) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.backend != "fsdp" or size in (-1, devices) or size < 1 or devices % size:
            return None
        return f"copies of the model over {size} of {devices} devices are not in this version; set it to -1"

    @checks.add("error", key, PER_NODE, NODES)
    def copies_divide_over_devices(view: View) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.backend != "fsdp" or size == -1 or (size > 0 and devices % size == 0):
            return None
        return f"{devices} devices ({NODES} × {PER_NODE}) do not divide into groups of {size}; -1 takes all"


for _key in FSDP_SIZES:
    _check_fsdp_size(_key)


@checks.add("error", TENSOR_PARALLEL, ENGINE, PER_NODE, NODES)
def engines_divide_over_devices(view: View) -> str | None:
    """Each engine gets its share of the devices."""
    size, devices = view[TENSOR_PARALLEL], view.config.devices
    if view[ENGINE] != "vllm" or devices % size == 0:
        return None
    return f"{devices} devices ({NODES} × {PER_NODE}) do not divide into engines of {size}"
