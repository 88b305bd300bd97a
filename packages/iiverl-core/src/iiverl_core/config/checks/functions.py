"""Are the functions that the user brings where the configuration says?"""

import ast
from pathlib import Path

from iiverl_core.config.checks.view import Checks, View, is_there, looked_up
from iiverl_core.config.sections.section import ADV_ESTIMATOR, LOSS_MODE, is_own
from iiverl_core.config.suggest import nearest

checks = Checks()

REWARD, REWARD_NAME = "custom_reward_function.path", "custom_reward_function.name"


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

    @checks.add("C921", "here", reads[-1])
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
