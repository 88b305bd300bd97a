"""User functions: load a user's Python file as a module, find a function in it, and describe its errors."""

import ast
import inspect
import sys
import traceback
from collections.abc import Callable, Collection
from hashlib import sha256
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from reprlib import Repr
from types import ModuleType
from typing import Any

from iiverl_core.errors import ConfigError

_FRAMES_SHOWN = 3
_MESSAGE_LENGTH = 500

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def split_function_name(text: str) -> tuple[str, str] | None:
    """Split `path/to/file.py:name` into path and name; None if the text names no Python file.

    The name is empty if there is only a file.
    """
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        return path, name
    return (text, "") if text.endswith(".py") else None


def load_file(path: str | Path, key: str) -> tuple[Path, ModuleType]:
    """Run a user's Python file as a module; return its full path and the module.

    As with any import, a file runs once per process, and again only if it has changed. `~` in the path is the home folder.
    `key` is the key of the configuration that names the file; messages begin with it.

    Raises:
        ConfigError: there is no such file, or running it fails; has the last frames in the file.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        kind = "is a folder, not a Python file" if path.is_dir() else "does not exist"
        raise ConfigError(f"{key}: {path} {kind}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from error
    name = f"iiverl_custom_{path.stem}_{sha256(bytes(path) + content).hexdigest()[:12]}"
    if name in sys.modules:
        return path, sys.modules[name]
    spec = spec_from_loader(name, SourceFileLoader(name, str(path)))
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {path} cannot be read as a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(
            str(path.parent)
        )  # the file may import its neighbours; at the end, so that it hides nothing
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{key}: importing {path} failed.\n{user_traceback(error, path)}") from error
    return path, module


def find_callable(path: Path, module: ModuleType, name: str, key: str) -> Callable[..., Any]:
    """Find the function `name` in a user's file.

    Raises:
        ConfigError: the file does not define the name, or it is not callable; lists what can be called.
    """
    if not hasattr(module, name):
        raise ConfigError(
            f"{key}: {path} does not define {name!r}. It defines: {', '.join(_defined(path, module)) or 'no functions'}."
        )
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{key}: {name!r} in {path} is not a function but {repr_with_type(function)}")
    return function


def find_installed(name: str, key: str) -> tuple[Path, Callable[..., Any]]:
    """Import `package.module:attribute`, which is callable; return the module's file too.

    Raises:
        ConfigError: importing fails, or the module does not define it; lists what can be called.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        message = "".join(traceback.format_exception_only(error)).strip()
        raise ConfigError(f"{key}: importing {module_name} failed.\n{message}") from error
    path = Path(module.__file__ or module_name)
    return path, find_callable(path, module, attribute, key)


def static_signature(path: str | Path, name: str) -> inspect.Signature | None:
    """Read the signature of a function in a Python file without running the file.

    Returns None if the file does not parse, or if the function is only known at run time: `name` is imported, assigned,
    decorated, or defined more than once.
    """
    try:
        module = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    binds = [node for node in module.body if _mentions(node, name)]
    if len(binds) != 1 or not isinstance(binds[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    return None if binds[0].decorator_list else _signature(binds[0].args)


def call_problem(
    signature: inspect.Signature, name: str, path: str | Path, arguments: Collection[str]
) -> str | None:
    """Explain why the function `name` cannot be called with these keyword arguments; None if it can."""
    try:
        signature.bind(**dict.fromkeys(arguments))
    except TypeError as error:
        return (
            f"{name}{signature} in {path} cannot be called with its keyword arguments: {error}. "
            f"Define it as {name}({', '.join(arguments)})."
        )
    return None


def user_traceback(error: BaseException, path: Path) -> str:
    """Describe an exception by the last frames of its traceback in the user's file, and its message."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    lines = [
        f"{path.name}, line {frame.lineno}, in {frame.name}: {frame.line}"
        for frame in frames[-_FRAMES_SHOWN:]
    ]
    message = "".join(traceback.format_exception_only(error)).strip()
    if len(message) > _MESSAGE_LENGTH:
        message = f"{message[:_MESSAGE_LENGTH]}…"
    return "\n".join([*lines, message])


def short_repr(value: Any) -> str:
    """Return the `repr` of a value, shortened."""
    return _SHOWN.repr(value)


def repr_with_type(value: Any) -> str:
    """Return the shortened `repr` of a value, with its type."""
    return "None" if value is None else f"{short_repr(value)} of type {type(value).__name__}"


def _defined(path: Path, module: ModuleType) -> list[str]:
    """List the public callables that a file defines itself rather than imports."""
    assigned = {
        name.id
        for statement in ast.parse(path.read_bytes()).body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and (name in assigned or getattr(value, "__module__", None) == module.__name__)
    ]


def _mentions(statement: ast.stmt, name: str) -> bool:
    """Return whether a top-level statement may bind a name, including in a branch or by a star import."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return statement.name == name
    for node in ast.walk(statement):
        if isinstance(node, ast.alias) and (node.asname or node.name.partition(".")[0]) in (name, "*"):
            return True
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
    return False


def _signature(given: ast.arguments) -> inspect.Signature:
    """Build the signature of a function from its parsed parameters, with `...` for every default."""

    def parameter(node: ast.arg, kind: Any, optional: bool = False) -> inspect.Parameter:
        return inspect.Parameter(node.arg, kind, default=... if optional else inspect.Parameter.empty)

    Kind = inspect.Parameter
    positional = [(node, Kind.POSITIONAL_ONLY) for node in given.posonlyargs]
    positional += [(node, Kind.POSITIONAL_OR_KEYWORD) for node in given.args]
    required = len(positional) - len(given.defaults)
    parameters = [parameter(node, kind, i >= required) for i, (node, kind) in enumerate(positional)]
    if given.vararg:
        parameters.append(parameter(given.vararg, Kind.VAR_POSITIONAL))
    for node, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(parameter(node, Kind.KEYWORD_ONLY, default is not None))
    if given.kwarg:
        parameters.append(parameter(given.kwarg, Kind.VAR_KEYWORD))
    return inspect.Signature(parameters)
