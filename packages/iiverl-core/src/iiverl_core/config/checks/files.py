"""Checks that the models, tokenizers, modules and checkpoints of the configuration exist."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from iiverl_core.config.checks.check import Checks, ConfigView, is_local_path, path_exists
from iiverl_core.config.model_facts import find_config
from iiverl_core.config.roles import Role
from iiverl_core.config.suggest import nearest

checks = Checks()

LIBRARY = "actor_rollout_ref.model.external_lib"
MODEL = "actor_rollout_ref.model.path"
CRITIC, REWARD = "critic.model.path", "reward_model.model.path"
RESUME, RESUME_FROM = "trainer.resume_mode", "trainer.resume_from_path"
OUTPUTS = {
    "trainer.default_local_dir": None,
    "trainer.rollout_data_dir": None,
    "trainer.validation_data_dir": None,
    "reward_api.save_dir": "reward_api.enable",
    "reward_api.cache_dir": "reward_api.enable",
}
"""Keys of folders that a run writes to, and the key that has to be true for it, if there is one."""
SAVE_FREQ, CONTENTS = "trainer.save_freq", "actor_rollout_ref.actor.checkpoint.save_contents"
RESUME_MODES = ("auto", "disable", "resume_path")


def _no_model(view: ConfigView, key: str) -> str | None:
    """Explain that a path is neither a folder nor a possible Hub name; None if it is."""
    path = view[key]
    if path_exists(Path.is_dir, path) or find_config(path) or not (is_local_path(path) or "/" not in path):
        return None
    default = "" if view.is_set(key) else " (the default)"
    near = f"; did you mean {meant}?" if (meant := _near(path)) else "; a Hub name looks like org/name"
    return f"the folder {path}{default} does not exist{near}"


def _near(path: str) -> str | None:
    """Find a folder beside a path whose name is spelled similarly."""
    place, _, name = path.rstrip("/").rpartition("/")
    try:
        folders = [each.name for each in Path(place or ".").iterdir() if each.is_dir()]
    except (OSError, ValueError):
        return None
    near = get_close_matches(name, folders, n=1)
    return f"{place}/{near[0]}" if near and place else near[0] if near else None


def _check_model(role: Role, key: str, advice: str = "") -> None:
    @checks.add("C905", "input", key, role=role)
    def model_exists(view: ConfigView) -> str | None:
        path = view[key]
        if path_exists(Path.is_dir, path):
            return None if find_config(path) else f"the folder {path} has no config.json"
        problem = _no_model(view, key)
        if problem and advice and not view.is_set(key):
            return f"the folder {path} (the default) does not exist; {advice}"
        return problem

    @checks.add("C917", "warning", key, role=role)
    def hub_name_is_meant(view: ConfigView) -> str | None:
        path = view[key]
        if (
            path.count("/") != 1
            or _no_model(view, key)
            or path_exists(Path.is_dir, path)
            or find_config(path)
        ):
            return None
        near = _near(path)
        return (
            f"there is no folder {path}, so it will be looked up on the Hub; did you mean {near}?"
            if near
            else None
        )


_check_model("actor", MODEL)
_check_model("critic", CRITIC, f"set {CRITIC}, for example to ${{{MODEL}}}")
_check_model("reward", REWARD, f"set {REWARD} to a sequence-classification model")


def _check_tokenizer(role: Role, key: str) -> None:
    @checks.add("C906", "input", key, role=role)
    def tokenizer_exists(view: ConfigView) -> str | None:
        return None if view[key] in (None, view[MODEL]) else _no_model(view, key)


_check_tokenizer("actor", "data.tokenizer")
_check_tokenizer("reward", "reward_model.model.input_tokenizer")


def _check_library(role: Role, key: str) -> None:
    @checks.add("C907", "unsupported", key, role=role)
    def library_is_installed(view: ConfigView) -> str | None:
        name = view[key]
        if name is None or (key != LIBRARY and not view.is_set(key)):  # it follows LIBRARY
            return None
        top = name.partition(".")[0]
        if top in sys.modules or (top.isidentifier() and importlib.util.find_spec(top)):
            return None
        return f"there is no Python module {name}; install it, or add its folder to PYTHONPATH"


_check_library("actor", LIBRARY)
_check_library("critic", "critic.model.external_lib")
_check_library("reward", "reward_model.model.external_lib")


@checks.add("C908", "error", RESUME, RESUME_FROM)
def _resumes_from_a_checkpoint(view: ConfigView) -> str | None:
    mode, path = view[RESUME], view[RESUME_FROM]
    if mode == "resume_path" and not (path and "global_step_" in path):
        return f"resume_path needs a …/global_step_N folder in {RESUME_FROM}"
    if mode in RESUME_MODES or "global_step_" in mode:
        return None
    near = nearest(mode, list(RESUME_MODES))
    hint = f"; did you mean {near}?" if near else ""
    return f"expected {', '.join(RESUME_MODES)} or a …/global_step_N folder, not {mode!r}{hint}"


@checks.add("C909", "input", RESUME, RESUME_FROM)
def _checkpoint_exists(view: ConfigView) -> str | None:
    path = view[RESUME_FROM] if view[RESUME] == "resume_path" else view[RESUME]
    if not path or "global_step_" not in path or Path(path).is_dir():
        return None
    return f"there is no folder {path}"


def output_folders(at: Callable[[str], Any]) -> Iterator[tuple[str, Path]]:
    """Yield the key and the path of each folder that a run writes to; `at` returns the value of a key."""
    for key, condition in OUTPUTS.items():
        if at(key) and (condition is None or at(condition)):
            yield key, Path(at(key)).absolute()


def _check_output(key: str, condition: str | None) -> None:
    @checks.add("C919", "input", key, *([condition] if condition else ()))
    def folder_can_be_written(view: ConfigView) -> str | None:
        folder = dict(output_folders(view.__getitem__)).get(key)
        if folder is None:
            return None
        there = next(path for path in (folder, *folder.parents) if path_exists(Path.exists, str(path)))
        if not there.is_dir():
            return f"{folder} cannot be written: {there} is not a folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{folder} cannot be written: {there} belongs to somebody else or is read-only"
        return None


for _key, _condition in OUTPUTS.items():
    _check_output(_key, _condition)


@checks.add("C920", "warning", CONTENTS, SAVE_FREQ)
def _checkpoints_can_be_resumed(view: ConfigView) -> str | None:
    missing = [part for part in ("model", "optimizer") if part not in view[CONTENTS]]
    if view[SAVE_FREQ] < 1 or not missing:
        return None
    return f"no run can resume from checkpoints without {' and '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}"
