"""Checks of rollouts of several turns."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.sections.section import AGENT_LOOP
from iiverl_core.registry import REWARD_MODEL, ROLLOUTERS
from iiverl_core.registry.rewards import MANAGER_KEY

checks = Checks()

MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
ENVIRONMENT = f"{MULTI_TURN}.environment"
PATH = f"{ENVIRONMENT}.path"
TURN, WHOLE, ADD = (f"{ENVIRONMENT}.{name}" for name in ("turn_timeout", "rollout_timeout", "add_reward"))
STALL = "trainer.stall_timeout"
ENGINE_DEVICES = "actor_rollout_ref.rollout.tensor_model_parallel_size"
TOOLS, TOOL_NAMES, TOOL_TIMEOUT = (f"{MULTI_TURN}.tools.{name}" for name in ("path", "names", "timeout"))
SINGLE_TURN, WITH_ENVIRONMENT, WITH_TOOLS = "single_turn", "environment", "tools"
ADDED_TO = ("reward_api.enable", "custom_reward_function.path", "reward_model.enable", MANAGER_KEY)


def _loop(view: ConfigView) -> str:
    return ROLLOUTERS[view[AGENT_LOOP]].name


@checks.add("C251", "error", f"{MULTI_TURN}.enable", AGENT_LOOP)
def _the_loop_has_turns(view: ConfigView) -> str | None:
    asked, loop = view[f"{MULTI_TURN}.enable"], _loop(view)
    if asked is None or asked == (loop != SINGLE_TURN):
        return None
    if not asked:
        return f"{AGENT_LOOP} is {loop}, which has several turns; remove one of them"
    others = " or ".join(name for name in ROLLOUTERS if name != SINGLE_TURN)
    return f"{AGENT_LOOP} is {loop}, so a rollout is one response; set it to {others}"


@checks.add("C252", "error", PATH, AGENT_LOOP)
def _there_is_an_environment(view: ConfigView) -> str | None:
    if _loop(view) != WITH_ENVIRONMENT or view[PATH]:
        return None
    return f"{AGENT_LOOP}: {WITH_ENVIRONMENT} needs the file of the environment's class; set {PATH}"


@checks.add("C253", "unsupported", AGENT_LOOP, ENGINE_DEVICES)
def _an_engine_is_one_process(view: ConfigView) -> str | None:
    size = view.config.engine_devices
    if _loop(view) == SINGLE_TURN or size == 1:
        return None
    return f"rollouts of several turns need engines of one device each, and {ENGINE_DEVICES} is {size}; set it to 1"


@checks.add("C254", "warning", TURN, WHOLE, STALL, AGENT_LOOP)
def _limits_are_kept(view: ConfigView) -> str | None:
    if _loop(view) != WITH_ENVIRONMENT:
        return None
    if view[TURN] > view[WHOLE]:
        return f"has no effect: all calls of a rollout may take {view[WHOLE]:g} s ({WHOLE})"
    if 0 < view[STALL] <= view[TURN]:
        return f"a call may take {view[TURN]:g} s, but {STALL} ends a run in which nothing happens for {view[STALL]} s"
    return None


@checks.add("C255", "warning", ADD, AGENT_LOOP, *ADDED_TO)
def _the_reward_of_the_environment_counts(view: ConfigView) -> str | None:
    if _loop(view) != WITH_ENVIRONMENT:
        return None
    source, model = view.config.reward_source, view["reward_model.enable"]
    alone = source is not None and source.name == WITH_ENVIRONMENT and not model
    if alone:
        return "has no effect: no other source gives a score to add it to" if view[ADD] else None
    names = [name for name in (source and source.name, model and REWARD_MODEL.name) if name]
    return (
        None
        if view[ADD]
        else f"the environment's rewards do not count, since {' and '.join(names)} gives the score; set {ADD} to true to add them"
    )


@checks.add("C256", "error", TOOLS, TOOL_NAMES, AGENT_LOOP)
def _there_are_tools(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS or (view[TOOLS] and view[TOOL_NAMES]):
        return None
    missing = TOOL_NAMES if view[TOOLS] else TOOLS
    what = "the names of the functions" if view[TOOLS] else "the file of the functions"
    return f"{AGENT_LOOP}: {WITH_TOOLS} needs {what} that the model may call; set {missing}"


@checks.add("C257", "warning", TOOL_TIMEOUT, STALL, AGENT_LOOP)
def _the_limit_of_tools_is_kept(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS or not 0 < view[STALL] <= view[TOOL_TIMEOUT]:
        return None
    return f"a call may take {view[TOOL_TIMEOUT]:g} s, but {STALL} ends a run in which nothing happens for {view[STALL]} s"
