"""Are the functions that the user brings where the configuration says?"""

import ast
from pathlib import Path

from iiverl_core.config.checks.view import Checks, View, is_there, looked_up
from iiverl_core.config.sections.custom_reward_function import REWARD_ARGUMENTS
from iiverl_core.config.sections.section import ADV_ESTIMATOR, LOSS_MODE, is_own
from iiverl_core.config.suggest import nearest
from iiverl_core.python_files import static_signature, unaccepted

checks = Checks()

REWARD, REWARD_NAME = "custom_reward_function.path", "custom_reward_function.name"
REWARD_KWARGS = "custom_reward_function.reward_kwargs"


def _reward(view: View) -> tuple[str, str] | None:
    return (view[REWARD], view[REWARD_NAME]) if view[REWARD] else None


def _own(view: View, key: str) -> tuple[str, str] | None:
    if not is_own(view[key]):
        return None
    path, _, name = view[key].rpartition(":")
    return path, name


def _check_function(*reads: str) -> None:
    """The checks of a function that these keys name: the file and the name, or both in one."""

    def named(view: View) -> tuple[str, str] | None:
        return _reward(view) if REWARD in reads else _own(view, reads[0])

    @checks.add("C921", "input", reads[-1])
    def file_exists(view: View) -> str | None:
        function = named(view)
        if function is None or is_there(Path.is_file, function[0]):
            return None
        return f"not found: {function[0]}{looked_up(view, [function[0]])}"

    @checks.add("C922", "error", *reads)
    def function_exists(view: View) -> str | None:
        function = named(view)
        return _undefined(*function) if function and is_there(Path.is_file, function[0]) else None


def _undefined(path: str, name: str) -> str | None:
    """Say that a file is no Python, or that it does not define a function."""
    try:
        module = ast.parse(Path(path).read_bytes(), path)
    except SyntaxError as error:
        return f"{path} is not valid Python in line {error.lineno}: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    names = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    other = any(
        not isinstance(node, ast.FunctionDef | ast.Expr) and name in ast.unparse(node) for node in module.body
    )
    star = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in module.body)
    if name in names or other or star:
        return None
    near = nearest(name, sorted(names))
    return f"{path} defines no function {name}" + (f"; did you mean {near}?" if near else "")


_check_function(REWARD_NAME, REWARD)
_check_function(ADV_ESTIMATOR)
_check_function(LOSS_MODE)


@checks.add("C923", "input", REWARD_NAME, REWARD, REWARD_KWARGS)
def reward_function_takes_its_arguments(view: View) -> str | None:
    """The reward function can be called with what it is given, as far as that shows without running its file."""
    signature = static_signature(view[REWARD], view[REWARD_NAME]) if view[REWARD] else None
    if signature is None:
        return None
    arguments = dict.fromkeys((*REWARD_ARGUMENTS, *view[REWARD_KWARGS]))
    problem = unaccepted(signature, view[REWARD_NAME], view[REWARD], list(arguments))
    return problem.rstrip(".") if problem else None


@checks.add("C924", "error", REWARD_KWARGS, REWARD)
def reward_kwargs_are_further_arguments(view: View) -> str | None:
    """What every sample brings is not given once for all."""
    clash = sorted(set(view[REWARD_KWARGS]) & set(REWARD_ARGUMENTS))
    return f"{', '.join(clash)} cannot be given here; every sample brings its own" if clash else None
