"""Checks of user functions: the file, the name, the arguments."""

import ast
from collections.abc import Sequence
from pathlib import Path

from iiverl_core.config.checks.check import Checks, ConfigView, lookup_hint, path_exists
from iiverl_core.config.sections.rewards import REWARD_ARGUMENTS
from iiverl_core.config.sections.section import ADV_ESTIMATOR, LOSS_MODE, is_user_function
from iiverl_core.config.suggest import nearest
from iiverl_core.python_files import call_problem, static_signature

checks = Checks()

REWARD, REWARD_NAME = "custom_reward_function.path", "custom_reward_function.name"
REWARD_KWARGS = "custom_reward_function.reward_kwargs"
ENVIRONMENT = "actor_rollout_ref.rollout.multi_turn.environment.path"
ENVIRONMENT_NAME = "actor_rollout_ref.rollout.multi_turn.environment.name"
TOOLS = "actor_rollout_ref.rollout.multi_turn.tools.path"
AGENT = "actor_rollout_ref.rollout.multi_turn.agent.path"
AGENT_NAME = "actor_rollout_ref.rollout.multi_turn.agent.name"
TOOL_NAMES = "actor_rollout_ref.rollout.multi_turn.tools.names"


def _user_function(view: ConfigView, key: str) -> tuple[str, Sequence[str]] | None:
    if not is_user_function(view[key]):
        return None
    path, _, name = view[key].rpartition(":")
    return path, (name,)


def _check_function(*reads: str) -> None:
    """Add the checks of functions or a class; `reads` are the keys of the names and the file, or one key of both."""

    def named(view: ConfigView) -> tuple[str, Sequence[str]] | None:
        if len(reads) == 1:
            return _user_function(view, reads[0])
        names, path = view[reads[0]] or (), view[reads[1]]
        return (path, (names,) if isinstance(names, str) else names) if path else None

    @checks.add("C921", "input", reads[-1])
    def file_exists(view: ConfigView) -> str | None:
        function = named(view)
        if function is None or path_exists(Path.is_file, function[0]):
            return None
        return f"not found: {function[0]}{lookup_hint(view, [function[0]])}"

    @checks.add("C922", "error", *reads)
    def function_exists(view: ConfigView) -> str | None:
        path, names = named(view) or ("", ())
        if not path or not path_exists(Path.is_file, path):
            return None
        return next(filter(None, (_undefined(path, name) for name in names)), None)


def _undefined(path: str, name: str) -> str | None:
    """Explain that a file is not valid Python or does not define a function; None if it does."""
    try:
        module = ast.parse(Path(path).read_bytes(), path)
    except SyntaxError as error:
        return f"{path} is not valid Python: line {error.lineno}: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    names = {
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    other = any(
        not isinstance(node, ast.FunctionDef | ast.Expr) and name in ast.unparse(node) for node in module.body
    )
    star = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in module.body)
    if name in names or other or star:
        return None
    near = nearest(name, sorted(names))
    return f"{path} does not define {name}" + (f"; did you mean {near}?" if near else "")


_check_function(REWARD_NAME, REWARD)
_check_function(ENVIRONMENT_NAME, ENVIRONMENT)
_check_function(TOOL_NAMES, TOOLS)
_check_function(AGENT_NAME, AGENT)
_check_function(ADV_ESTIMATOR)
_check_function(LOSS_MODE)


@checks.add("C923", "input", REWARD_NAME, REWARD, REWARD_KWARGS)
def _reward_function_takes_its_arguments(view: ConfigView) -> str | None:
    signature = static_signature(view[REWARD], view[REWARD_NAME]) if view[REWARD] else None
    if signature is None:
        return None
    arguments = dict.fromkeys((*REWARD_ARGUMENTS, *view[REWARD_KWARGS]))
    problem = call_problem(signature, view[REWARD_NAME], view[REWARD], list(arguments))
    return problem.rstrip(".") if problem else None


@checks.add("C924", "error", REWARD_KWARGS, REWARD)
def _reward_kwargs_are_further_arguments(view: ConfigView) -> str | None:
    clash = sorted(set(view[REWARD_KWARGS]) & set(REWARD_ARGUMENTS))
    return f"{', '.join(clash)} cannot be set here: each response has its own" if clash else None
