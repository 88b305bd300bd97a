"""Is what the configuration names on disk really there?"""

import importlib.util
import sys
from pathlib import Path

from iiverl_core.config.checks.view import Checks, View, is_there, looked_up, on_disk
from iiverl_core.config.roles import Role
from iiverl_core.config.suggest import nearest

checks = Checks()

LIBRARY = "actor_rollout_ref.model.external_lib"
MODEL = "actor_rollout_ref.model.path"
CRITIC, REWARD = "critic.model.path", "reward_model.model.path"
TRAIN, VAL = "data.train_files", "data.val_files"
RESUME, RESUME_FROM = "trainer.resume_mode", "trainer.resume_from_path"
RESUME_MODES = ("auto", "disable", "resume_path")


def _absent(view: View, key: str) -> str | None:
    absent = [name for name in view[key] if on_disk(name) and not is_there(Path.exists, name)]
    if not absent:
        return None
    default = "" if view.given(key) else " (the default)"
    return f"not found: {', '.join(absent)}{default}{looked_up(view, absent)}"


@checks.add("C901", "here", TRAIN)
def training_files_exist(view: View) -> str | None:
    """The training files are there."""
    return _absent(view, TRAIN)


@checks.add("C902", "here", VAL, "trainer.test_freq", "trainer.val_before_train")
def validation_files_exist(view: View) -> str | None:
    """The validation files are there, if they are read."""
    read = view["trainer.test_freq"] > 0 or view["trainer.val_before_train"]
    return _absent(view, VAL) if read and view[VAL] else None


@checks.add("C903", "warning", VAL, TRAIN, "data.train_split", "data.val_split")
def validation_is_unseen(view: View) -> str | None:
    """What is validated on is not what is trained on."""
    shared = [name for name in view[VAL] or () if name in view[TRAIN] and is_there(Path.is_file, name)]
    return f"{shared[0]} is also trained on" if shared else None


def _check_splits(files: str, splits: str) -> None:
    @checks.add("C904", "error", splits, files)
    def a_split_for_each(view: View) -> str | None:
        many, wanted = len(view[splits]), len(view[files] or ())
        if many in (1, wanted) or not wanted:
            return None
        return f"{many} splits for {wanted} of {files}; give one for all, or one for each"


_check_splits(TRAIN, "data.train_split")
_check_splits(VAL, "data.val_split")


def _check_model(role: Role, key: str, advice: str = "") -> None:
    @checks.add("C905", "here", key, role=role)
    def model_exists(view: View) -> str | None:
        path = view[key]
        if not on_disk(path):
            return None
        if is_there(Path.is_file, f"{path}/config.json"):
            return None
        if is_there(Path.is_dir, path):
            return f"the folder {path} holds no config.json"
        if advice and not view.given(key):
            return f"the folder {path}, the default, does not exist; {advice}"
        default = "" if view.given(key) else ", the default,"
        return f"the folder {path}{default} does not exist; a Hub name has the form org/name"


_check_model("actor", MODEL)
_check_model("critic", CRITIC, f"set {CRITIC}, for example to ${{{MODEL}}}")
_check_model("reward", REWARD, f"set {REWARD} to a sequence-classification model")


@checks.add("C906", "here", "reward_model.model.input_tokenizer", role="reward")
def tokenizer_exists(view: View) -> str | None:
    """The tokenizer that the responses were written with is there, where it is not the actor's."""
    path = view["reward_model.model.input_tokenizer"]
    if path in (None, view[MODEL]) or not on_disk(path) or is_there(Path.is_dir, path):
        return None
    return f"the folder {path} does not exist; a Hub name has the form org/name"


def _check_library(role: Role, key: str) -> None:
    @checks.add("C907", "here", key, role=role)
    def library_is_installed(view: View) -> str | None:
        name = view[key]
        if name is None or (key != LIBRARY and not view.given(key)):  # it follows LIBRARY
            return None
        top = name.partition(".")[0]
        if top in sys.modules or (top.isidentifier() and importlib.util.find_spec(top)):
            return None
        return f"there is no Python module {name}; install it, or put its folder on PYTHONPATH"


_check_library("actor", LIBRARY)
_check_library("critic", "critic.model.external_lib")
_check_library("reward", "reward_model.model.external_lib")


@checks.add("C908", "error", RESUME, RESUME_FROM)
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


@checks.add("C909", "here", RESUME, RESUME_FROM)
def can_resume(view: View) -> str | None:
    """Going on from a certain checkpoint is possible."""
    wanted = view[RESUME] in RESUME_MODES[2:] or "global_step_" in view[RESUME]
    return "not in this version: going on from a checkpoint; set it to disable" if wanted else None
