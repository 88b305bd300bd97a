"""Is what the configuration names on disk really there?"""

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from iiverl_core.config.checks.view import Checks, View, on_disk
from iiverl_core.config.suggest import nearest

checks = Checks()

LIBRARY = "actor_rollout_ref.model.external_lib"
MODEL = "actor_rollout_ref.model.path"
TRAIN, VAL = "data.train_files", "data.val_files"
FUNCTION, FUNCTION_NAME = "custom_reward_function.path", "custom_reward_function.name"
RESUME, RESUME_FROM = "trainer.resume_mode", "trainer.resume_from_path"
RESUME_MODES = ("auto", "disable", "resume_path")


def _is(what: Callable[[Path], bool], name: str) -> bool:
    """Ask about a path; one that the system cannot even look up is not there."""
    try:
        return what(Path(name))
    except (OSError, ValueError):
        return False


def _absent(view: View, key: str) -> str | None:
    absent = [name for name in view[key] if on_disk(name) and not _is(Path.exists, name)]
    if not absent:
        return None
    default = "" if view.given(key) else " (the default)"
    return f"not found: {', '.join(absent)}{default}{_looked_up(view, absent)}"


def _looked_up(view: View, absent: list[str]) -> str:
    """Say from where relative paths were looked up, and whether the YAML file's own folder has them."""
    relative = [name for name in absent if not Path(name).is_absolute()]
    if not relative:
        return ""
    folder = Path(view.file).parent.absolute()
    there = all(_is(Path.exists, str(folder / name)) for name in relative)
    return f", looked up from {Path.cwd()}" + (f"; run from {folder}, which has it" if there else "")


@checks.add("here", TRAIN)
def training_files_exist(view: View) -> str | None:
    """The training files are there."""
    return _absent(view, TRAIN)


@checks.add("here", VAL, "trainer.test_freq", "trainer.val_before_train")
def validation_files_exist(view: View) -> str | None:
    """The validation files are there, if they are read."""
    read = view["trainer.test_freq"] > 0 or view["trainer.val_before_train"]
    return _absent(view, VAL) if read and view[VAL] else None


@checks.add("warning", VAL, TRAIN, "data.train_split", "data.val_split")
def validation_is_unseen(view: View) -> str | None:
    """What is validated on is not what is trained on."""
    shared = [name for name in view[VAL] or () if name in view[TRAIN] and _is(Path.is_file, name)]
    return f"{shared[0]} is also trained on" if shared else None


def _check_splits(files: str, splits: str) -> None:
    @checks.add("error", splits, files)
    def a_split_for_each(view: View) -> str | None:
        many, wanted = len(view[splits]), len(view[files] or ())
        if many in (1, wanted) or not wanted:
            return None
        return f"{many} splits for {wanted} of {files}; give one for all, or one for each"


_check_splits(TRAIN, "data.train_split")
_check_splits(VAL, "data.val_split")


@checks.add("here", MODEL)
def model_exists(view: View) -> str | None:
    """A model that is named as a folder is there, and is one of transformers."""
    path = view[MODEL]
    if not on_disk(path):
        return None
    default = "" if view.given(MODEL) else ", the default,"
    if not _is(Path.is_dir, path):
        return f"the folder {path}{default} does not exist; a Hub name has the form org/name"
    return None if _is(Path.is_file, f"{path}/config.json") else f"the folder {path} holds no config.json"


@checks.add("here", LIBRARY)
def library_is_installed(view: View) -> str | None:
    """The module that registers the model can be found."""
    top = (view[LIBRARY] or "").partition(".")[0]
    if view[LIBRARY] is None or top in sys.modules or (top.isidentifier() and importlib.util.find_spec(top)):
        return None
    return f"there is no Python module {view[LIBRARY]}; install it, or put its folder on PYTHONPATH"


@checks.add("here", FUNCTION)
def function_file_exists(view: View) -> str | None:
    """The file of a custom reward function is there."""
    path = view[FUNCTION]
    if not path or _is(Path.is_file, path):
        return None
    return f"not found: {path}{_looked_up(view, [path])}"


@checks.add("error", FUNCTION_NAME, FUNCTION)
def function_exists(view: View) -> str | None:
    """The file of a custom reward function is Python, and defines the function."""
    path, name = view[FUNCTION], view[FUNCTION_NAME]
    if not path or not _is(Path.is_file, path):
        return None
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


@checks.add("error", RESUME, RESUME_FROM)
def resumes_from_a_checkpoint(view: View) -> str | None:
    """A checkpoint is named by its folder."""
    mode, path = view[RESUME], view[RESUME_FROM]
    if mode == "resume_path" and not (path and "global_step_" in path):
        return f"resume_path goes on from the …/global_step_N folder in {RESUME_FROM}, and that names none"
    if mode in RESUME_MODES or "global_step_" in mode:
        return None
    near = nearest(mode, list(RESUME_MODES))
    hint = f"; did you mean {near}?" if near else ""
    return f"expected {', '.join(RESUME_MODES)} or a …/global_step_N folder, not {mode!r}{hint}"


@checks.add("here", RESUME, RESUME_FROM)
def can_resume(view: View) -> str | None:
    """Going on from a certain checkpoint is possible."""
    wanted = view[RESUME] in RESUME_MODES[2:] or "global_step_" in view[RESUME]
    return "not in this version: going on from a checkpoint; set it to disable" if wanted else None
