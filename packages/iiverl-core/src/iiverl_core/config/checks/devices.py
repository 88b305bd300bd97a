"""Checks of what is installed, and of how the run uses its devices."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.model_facts import nearest_sizes, read_model_facts
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.profiler import PROFILER
from iiverl_core.config.sections.section import ADV_ESTIMATOR, BACKEND, ENGINE
from iiverl_core.installation import install_command
from iiverl_core.registry import (
    BACKENDS,
    ENGINES,
    ESTIMATORS,
    METRICS,
    REGISTRIES,
    REWARD_SOURCES,
    TRACKERS,
    load_code,
)
from iiverl_core.registry.rewards import MANAGER_KEY

checks = Checks()

PROFILE, PROFILE_TOOL, PROFILE_STEPS = f"{PROFILER}.enable", "global_profiler.tool", "global_profiler.steps"
RUNTIME, NODES, PER_NODE = "trainer.runtime", "trainer.nnodes", "trainer.n_gpus_per_node"
MODEL, OVERRIDE = "actor_rollout_ref.model.path", "actor_rollout_ref.model.override_config"
STALENESS, PARTIAL = "trainer.max_staleness", "actor_rollout_ref.rollout.partial"
ROLLOUT_DEVICES, CPUS = "trainer.rollout_devices", "ray_kwargs.ray_init.num_cpus"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
MIN_ENGINES = "actor_rollout_ref.rollout.min_engines"


@checks.add("C701", "unsupported", BACKEND)
def _backend_is_installed(view: ConfigView) -> str | None:
    return BACKENDS[view.config.backend].missing()


@checks.add("C702", "unsupported", ENGINE)
def _engine_is_installed(view: ConfigView) -> str | None:
    return ENGINES[view[ENGINE]].missing()


@checks.add("C709", "unsupported", MODEL, OVERRIDE, ENGINE)
def _engine_runs_the_model(view: ConfigView) -> str | None:
    engine, facts = ENGINES[view[ENGINE]], read_model_facts(view[MODEL], view[OVERRIDE])
    if engine.check_model is None or facts is None:
        return None
    problem = load_code(engine.check_model, engine.name)(facts)
    return problem and f"the model {view[MODEL]} {problem}; use another model or another engine ({ENGINE})"


@checks.add("C703", "unsupported", "trainer.logger")
def _trackers_are_installed(view: ConfigView) -> str | None:
    trackers = [TRACKERS[name] for name in dict.fromkeys(view["trainer.logger"])]
    absent = [tracker.package for tracker in trackers if tracker.package and tracker.missing()]
    if not absent:
        return None
    are = "is" if len(absent) == 1 else "are"
    return f"{' and '.join(absent)} {are} not installed; install with: {install_command(*absent)}"


def _check_entry_points(group: str, key: str) -> None:
    @checks.add("C931", "warning", key)
    def entry_points_are_usable(view: ConfigView) -> str | None:
        broken: dict[str, str] = {}
        for registry in REGISTRIES:
            broken |= registry.broken if registry.group == group else {}
        return "; ".join(f"the {entry} is ignored: {reason}" for entry, reason in broken.items()) or None


for _group, _key in {
    ESTIMATORS.group: ADV_ESTIMATOR,  # of the group of all algorithms
    ENGINES.group: ENGINE,
    BACKENDS.group: BACKEND,
    REWARD_SOURCES.group: MANAGER_KEY,
    METRICS.group: "trainer.logger",
    TRACKERS.group: "trainer.logger",
}.items():
    _check_entry_points(_group, _key)


def _check_backend(role: Role, key: str) -> None:
    @checks.add("C403", "error", key, BACKEND, role=role)
    def one_backend(view: ConfigView) -> str | None:
        if BACKENDS[view[key]] is BACKENDS[view[BACKEND]]:
            return None
        return f"{view[key]} differs from {BACKEND} ({view[BACKEND]}); leave it out, since all models share one backend"


_check_backend("reference", "actor_rollout_ref.ref.strategy")
_check_backend("critic", "critic.strategy")
_check_backend("reward", "reward_model.strategy")


@checks.add("C704", "error", RUNTIME, PER_NODE, NODES)
def _local_runs_on_one_device(view: ConfigView) -> str | None:
    if view[RUNTIME] != "local" or view.config.devices == 1:
        return None
    return f"the local runtime uses one device, not {view.config.devices}; set {PER_NODE} and {NODES} to 1"


@checks.add("C705", "error", ROLLOUT_DEVICES, RUNTIME)
def _local_has_no_other_devices(view: ConfigView) -> str | None:
    if view[ROLLOUT_DEVICES] is None or view[RUNTIME] != "local":
        return None
    return f"the local runtime has one process and cannot use other devices; leave it out, or set {RUNTIME} to ray"


@checks.add("C714", "error", STALENESS, ROLLOUT_DEVICES)
def _generation_beside_training_has_devices(view: ConfigView) -> str | None:
    if not view[STALENESS] or view[ROLLOUT_DEVICES] is not None:
        return None
    return f"needs devices that only generate; set {ROLLOUT_DEVICES}, or leave it out to generate and train in turn"


@checks.add("C715", "warning", PARTIAL, STALENESS)
def _weights_come_while_responses_are_written(view: ConfigView) -> str | None:
    if not view[PARTIAL] or view[STALENESS]:
        return None
    return f"has no effect while generating and training take turns; set {STALENESS}, or leave it out"


@checks.add("C713", "error", CPUS, RUNTIME, NODES, PER_NODE, ROLLOUT_DEVICES)
def _ray_has_a_cpu_for_each_process(view: ConfigView) -> str | None:
    most, processes = view[CPUS], view.config.devices + (view[ROLLOUT_DEVICES] or 0)
    if most is None or view[RUNTIME] != "ray" or view[NODES] > 1 or most >= processes:
        return None
    return f"{most} is below the {processes} processes of the run, each of which takes a CPU of Ray; raise it, or leave it out"


def _check_fsdp_size(role: Role, key: str) -> None:
    @checks.add("C706", "unsupported", key, PER_NODE, NODES, role=role)
    def one_copy_over_all(view: ConfigView) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.splits_models or size in (-1, devices) or size < 1 or devices % size:
            return None
        return f"not supported in this version: sharding over {size} of {devices} devices; set it to -1"

    @checks.add("C707", "error", key, PER_NODE, NODES, role=role)
    def copies_divide_over_devices(view: ConfigView) -> str | None:
        size, devices = view[key], view.config.devices
        if view.config.splits_models or size == -1 or (size > 0 and devices % size == 0):
            return None
        return f"{devices} devices ({NODES} × {PER_NODE}) cannot be divided into groups of {size}; set it to -1 for all devices"


for _role, _keys in ROLE_KEYS.items():
    _check_fsdp_size(_role, f"{_keys.fsdp}.fsdp_size")


@checks.add("C708", "error", TENSOR_PARALLEL, ENGINE, PER_NODE, NODES, ROLLOUT_DEVICES)
def _engines_divide_over_devices(view: ConfigView) -> str | None:
    size, apart = view[TENSOR_PARALLEL], view[ROLLOUT_DEVICES]
    devices = view.config.devices if apart is None else apart
    if not ENGINES[view[ENGINE]].spans_devices or devices % size == 0:
        return None
    where = f"{NODES} × {PER_NODE}" if apart is None else ROLLOUT_DEVICES
    near = nearest_sizes(size, devices, lambda n: devices % n == 0)
    return f"{devices} devices ({where}) cannot be divided into engines of {size} ({TENSOR_PARALLEL}); use {near}"


@checks.add("C716", "error", MIN_ENGINES, ROLLOUT_DEVICES, TENSOR_PARALLEL, ENGINE)
def _engines_that_are_needed_exist(view: ConfigView) -> str | None:
    needed, devices = view[MIN_ENGINES], view[ROLLOUT_DEVICES]
    if needed is None:
        return None
    if devices is None:
        return f"only engines on devices of their own can be retired; set {ROLLOUT_DEVICES}, or leave it out"
    count = devices // view.config.engine_devices
    if needed <= count:
        return None
    return f"{ROLLOUT_DEVICES} has {count} engine{'s' * (count != 1)} of {view.config.engine_devices}, fewer than {needed}; lower it"


@checks.add("C711", "warning", PROFILE, PROFILE_TOOL, PROFILE_STEPS)
def _something_is_profiled(view: ConfigView) -> str | None:
    asked = {key: bool(view[key]) for key in (PROFILE, PROFILE_TOOL, PROFILE_STEPS)}
    if all(asked.values()) or not any(view.is_set(key) and asked[key] for key in asked):
        return None
    absent = [key for key, value in asked.items() if not value]
    return f"nothing is profiled without {' and '.join(absent)}"


@checks.add("C712", "error", f"{PROFILER}.ranks", PROFILE, PER_NODE, NODES)
def _profiled_ranks_exist(view: ConfigView) -> str | None:
    absent = [rank for rank in view[f"{PROFILER}.ranks"] if rank >= view.config.devices]
    if not absent or not view[PROFILE]:
        return None
    return f"there is no rank {absent[0]}; {view.config.devices} devices train, from 0"
