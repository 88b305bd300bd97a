"""Checks of rollouts of several turns."""

import importlib.util
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.sections.section import AGENT_LOOP
from iiverl_core.installation import install_command
from iiverl_core.registry import REWARD_MODEL, ROLLOUTERS
from iiverl_core.registry.rewards import MANAGER_KEY

checks = Checks()

MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
ENVIRONMENT = f"{MULTI_TURN}.environment"
PATH, NAME = f"{ENVIRONMENT}.path", f"{ENVIRONMENT}.name"
TURN, WHOLE, ADD = (f"{ENVIRONMENT}.{name}" for name in ("turn_timeout", "rollout_timeout", "add_reward"))
STALL = "trainer.stall_timeout"
ENGINE_DEVICES = "actor_rollout_ref.rollout.tensor_model_parallel_size"
TOOLS, TOOL_NAMES, TOOL_TIMEOUT = (f"{MULTI_TURN}.tools.{name}" for name in ("path", "names", "timeout"))
SERVERS = f"{MULTI_TURN}.tools.mcp_servers"
AGENT = f"{MULTI_TURN}.agent"
AGENT_PATH, COMMAND, AGENT_TIMEOUT, AGENT_ADD = (
    f"{AGENT}.{name}" for name in ("path", "command", "timeout", "add_reward")
)
SINGLE_TURN, WITH_ENVIRONMENT, WITH_TOOLS, WITH_AGENT = "single_turn", "environment", "tools", "agent"
ADAPTED = {"iiverl_core.gymnasium_environment": "gymnasium"}
"""Modules here that adapt environments of other packages, and the extra with that package."""
SERVER_PACKAGES = ("fastapi", "uvicorn")
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
    *others, last = (name for name in ROLLOUTERS if name != SINGLE_TURN)
    return f"{AGENT_LOOP} is {loop}, so a rollout is one response; set it to {', '.join(others)} or {last}"


@checks.add("C252", "error", PATH, NAME, AGENT_LOOP)
def _there_is_an_environment(view: ConfigView) -> str | None:
    if _loop(view) != WITH_ENVIRONMENT or view[PATH] or ":" in view[NAME]:
        return None
    return f"{AGENT_LOOP}: {WITH_ENVIRONMENT} needs the file of the environment's class; set {PATH}"


@checks.add("C262", "unsupported", NAME, PATH, AGENT_LOOP)
def _the_environment_is_installed(view: ConfigView) -> str | None:
    if _loop(view) != WITH_ENVIRONMENT or view[PATH] or ":" not in view[NAME]:
        return None
    module = view[NAME].partition(":")[0]
    needed = ADAPTED.get(module) or module.partition(".")[0]
    if not needed.isidentifier():
        return f"{module!r} is not the name of a module"
    if importlib.util.find_spec(needed) is not None:
        return None
    command = install_command(
        f"iiverl[{needed}]" if module in ADAPTED else needed,
        workspace="make setup" if module in ADAPTED else None,
    )
    return f"{needed} is not installed; install with: {command}"


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


@checks.add("C255", "warning", ADD, AGENT_ADD, AGENT_LOOP, *ADDED_TO)
def _the_reward_of_the_environment_counts(view: ConfigView) -> str | None:
    loop = _loop(view)
    if loop not in (WITH_ENVIRONMENT, WITH_AGENT):
        return None
    add = ADD if loop == WITH_ENVIRONMENT else AGENT_ADD
    source, model = view.config.reward_source, view["reward_model.enable"]
    alone = source is not None and source.name == WITH_ENVIRONMENT and not model
    if alone:
        return "has no effect: no other source gives a score to add it to" if view[add] else None
    if view[add]:
        return None
    names = " and ".join(name for name in (source and source.name, model and REWARD_MODEL.name) if name)
    if loop == WITH_AGENT:
        return None  # it may well return none
    return f"the environment's rewards do not count, since {names} gives the score; set {ADD} to true to add them"


@checks.add("C256", "error", TOOLS, TOOL_NAMES, SERVERS, AGENT_LOOP)
def _there_are_tools(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS or (view[TOOLS] and view[TOOL_NAMES]):
        return None
    if view[SERVERS] and not view[TOOLS] and not view[TOOL_NAMES]:
        return None
    missing = TOOL_NAMES if view[TOOLS] else TOOLS
    what = "the names of the functions" if view[TOOLS] else "the file of the functions"
    return f"{AGENT_LOOP}: {WITH_TOOLS} needs {what} that the model may call; set {missing}"


@checks.add("C257", "warning", TOOL_TIMEOUT, STALL, AGENT_LOOP)
def _the_limit_of_tools_is_kept(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS or not 0 < view[STALL] <= view[TOOL_TIMEOUT]:
        return None
    return f"a call may take {view[TOOL_TIMEOUT]:g} s, but {STALL} ends a run in which nothing happens for {view[STALL]} s"


@checks.add("C258", "error", AGENT_PATH, COMMAND, AGENT_LOOP)
def _there_is_one_agent(view: ConfigView) -> str | None:
    if _loop(view) != WITH_AGENT or bool(view[AGENT_PATH]) != bool((view[COMMAND] or "").strip()):
        return None
    if view[AGENT_PATH]:
        return f"an agent is a function or a command; remove {AGENT_PATH} or {COMMAND}"
    return f"{AGENT_LOOP}: {WITH_AGENT} needs the file of a function, or a command; set {AGENT_PATH} or {COMMAND}"


@checks.add("C259", "unsupported", AGENT_LOOP)
def _agents_have_a_server(view: ConfigView) -> str | None:
    if _loop(view) != WITH_AGENT:
        return None
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    command = install_command("iiverl[reward-server]", workspace="make setup")
    return (
        f"{WITH_AGENT} needs {' and '.join(missing)} for the server that agents ask; install with: {command}"
    )


@checks.add("C260", "warning", AGENT_TIMEOUT, STALL, AGENT_LOOP)
def _the_limit_of_agents_is_kept(view: ConfigView) -> str | None:
    if _loop(view) != WITH_AGENT or not 0 < view[STALL] <= view[AGENT_TIMEOUT]:
        return None
    return f"an agent may take {view[AGENT_TIMEOUT]:g} s, but {STALL} ends a run in which nothing happens for {view[STALL]} s"


@checks.add("C261", "error", COMMAND, AGENT_LOOP)
def _the_command_can_run(view: ConfigView) -> str | None:
    if _loop(view) != WITH_AGENT or not (view[COMMAND] or "").strip():
        return None
    try:
        program = shlex.split(view[COMMAND])[0]
    except ValueError as error:
        return f"is not a command line: {error}"
    if shutil.which(program) is None:
        return f"there is no program {program}"
    return None


@checks.add("C263", "error", SERVERS, AGENT_LOOP)
def _servers_have_commands(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS:
        return None
    return next(filter(None, (_server_problem(name, server) for name, server in view[SERVERS].items())), None)


def _server_problem(name: str, server: Any) -> str | None:
    if not isinstance(server, Mapping) or not isinstance(server.get("command"), str):
        return f"{name} needs a command, as in {{command: uvx, args: [mcp-server-time]}}"
    if unknown := sorted(set(server) - {"command", "args", "env", "cwd"}):
        return f"{name}: unknown {', '.join(unknown)}; a server has command, args, env and cwd"
    arguments, environment = server.get("args", ()), server.get("env", {})
    if not isinstance(arguments, Sequence) or not all(isinstance(each, str) for each in arguments):
        return f"{name}: args are a list of strings"
    if not isinstance(environment, Mapping) or not all(
        isinstance(each, str) for each in environment.values()
    ):
        return f"{name}: env has a string for each name"
    if shutil.which(server["command"], path=environment.get("PATH")) is None:
        return f"{name}: there is no program {server['command']}"
    return None


@checks.add("C264", "unsupported", SERVERS, AGENT_LOOP)
def _servers_have_a_client(view: ConfigView) -> str | None:
    if _loop(view) != WITH_TOOLS or not view[SERVERS] or importlib.util.find_spec("mcp") is not None:
        return None
    command = install_command("iiverl[mcp]", workspace="make setup")
    return f"the package mcp is not installed; install with: {command}"
