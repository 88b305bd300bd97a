"""Export a model of a checkpoint as a folder that transformers and vLLM read, on a CPU, in one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from iiverl_core.checkpoints import CONFIG_FILE, Checkpoint, read_json, verify
from iiverl_core.cluster.model_runner import model_spec
from iiverl_core.cluster.rendezvous import join_process_group
from iiverl_core.config import Config, RunConfig, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import CheckpointError, ConfigError, IIVerlError
from iiverl_core.registry import BACKENDS
from iiverl_core.training import Role, TrainingBackend
from iiverl_core.training.adapter import write_adapter
from iiverl_core.training.model_folder import SHARD_BYTES, write_description, write_safetensors


def export(
    folder: Path,
    target: Path,
    role: Role = "actor",
    dtype: str | None = None,
    *,
    adapter: bool = False,
    shard_bytes: int = SHARD_BYTES,
    log: Callable[[str], None],
) -> None:
    """Write a trained model of a checkpoint, its configuration, its tokenizer and a model card into `target`.

    Tensors are read one at a time, and those of one file of about `shard_bytes` are in memory.

    Args:
        adapter: write LoRA adapters in PEFT's format, instead of the model with the adapters merged into it.
        dtype: `bf16`, `fp16` or `fp32`; by default that of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is not valid, or does not hold the model.
        ConfigError: `target` is not empty, the configuration or tokenizer cannot be read, or there are no adapters.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; name a new folder")
    log(f"verifying {folder}")
    checkpoint = verify(folder)
    if role not in checkpoint.roles:
        raise CheckpointError(f"{folder} holds no {role}, but {', '.join(sorted(checkpoint.roles))}")
    run = saved_run(checkpoint)
    if adapter and not run.roles[role].model.lora_rank:
        raise ConfigError(f"the {role} in {folder} has no LoRA adapters: all of its weights were trained")
    log(f"writing {target}")
    if adapter:
        weights = dict(_cast(_saved(run, role, checkpoint, adapter=True), dtype))
        write_adapter(
            weights, run.roles[role].model, target, task="CAUSAL_LM" if role == "actor" else "TOKEN_CLS"
        )
        load_tokenizer(run).save_pretrained(target)
    else:
        write_weights(run, role, checkpoint, target, dtype, shard_bytes=shard_bytes)
        write_description(run, role, target, dtype)
    (target / "README.md").write_text(_card(run, role, checkpoint), encoding="utf-8")


def saved_run(checkpoint: Checkpoint) -> RunConfig:
    """Return the run that wrote a checkpoint."""
    return run_config(Config.model_validate(read_json(checkpoint.folder / CONFIG_FILE)))


def start_from_weights(run: RunConfig, checkpoint: Checkpoint, folder: Path) -> RunConfig:
    """Write the trained models of a checkpoint into `folder` as safetensors, and return the run that starts from them."""
    saved = saved_run(checkpoint)
    roles = dict(run.roles)
    for role, each in run.roles.items():
        if each.training:
            write_weights(saved, role, checkpoint, folder / role)
            if role == "actor":  # with a causal LM, transformers reads settings for generation
                write_description(saved, role, folder / role)
            roles[role] = replace(each, weights=folder / role)
    return replace(run, roles=roles)


def write_weights(
    run: RunConfig,
    role: Role,
    checkpoint: Checkpoint,
    target: Path,
    dtype: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights of a model of a checkpoint as safetensors, with LoRA adapters merged into them.

    Args:
        run: the run that wrote the checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold the model.
    """
    weights = _cast(_saved(run, role, checkpoint), dtype)
    write_safetensors(weights, target, write=True, shard_bytes=shard_bytes, one_at_a_time=True)()


def _saved(
    run: RunConfig, role: Role, checkpoint: Checkpoint, *, adapter: bool = False
) -> Iterator[tuple[str, Tensor]]:
    backend: type[TrainingBackend] = BACKENDS[run.backend].load()
    spec = replace(model_spec(run.roles[role], torch.device("cpu")), optim=None)
    with _alone():
        yield from backend.saved_weights(spec, checkpoint.folder / role, adapter=adapter)


class Upload:
    """A repository on the Hugging Face Hub that a folder is uploaded to; a new one is private."""

    def __init__(self, name: str) -> None:
        """Create the repository `name`, ORG/NAME, unless it exists.

        Raises:
            ConfigError: the name is invalid, or the user is not logged in or must not write there.
        """
        self._name, self._api = name, HfApi()
        try:
            self._api.create_repo(name, private=True, exist_ok=True)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ConfigError(
                f"the repository {name} cannot be created: {error}\nLog in with `hf auth login`, or set HF_TOKEN to a "
                "token that may write there."
            ) from error

    def send(self, folder: Path) -> str:
        """Upload a folder, and return the address of the commit.

        Raises:
            IIVerlError: it cannot be uploaded; the folder is kept.
        """
        try:
            return self._api.upload_folder(repo_id=self._name, folder_path=folder).commit_url
        except (HfHubHTTPError, OSError) as error:
            raise IIVerlError(
                f"{folder} cannot be uploaded to {self._name}: {error}\nThe folder is complete; to upload it later: "
                f"hf upload {self._name} {folder}"
            ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Make a process group of this process alone, unless it is in one."""
    if dist.is_initialized():
        yield
        return
    with TemporaryDirectory(prefix="iiverl-") as folder:
        join_process_group((Path(folder) / "rendezvous").as_uri(), 0, 1, "cpu")
        try:
            yield
        finally:
            dist.destroy_process_group()


def _cast(weights: Iterator[tuple[str, Tensor]], dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        yield name, weight.to(torch_dtype(dtype)) if dtype and weight.is_floating_point() else weight


def _card(run: RunConfig, role: Role, checkpoint: Checkpoint) -> str:
    """Write the model card."""
    base = run.roles[role].model.path
    rewards = run.rewards.source or "a reward model"
    named = f"base_model: {base}\n" if not Path(base).exists() else ""
    facts = {
        "base model": base,
        "algorithm": f"{run.algorithm.adv_estimator}, policy loss {run.loss.policy_loss}",
        "training data": ", ".join(map(str, run.data.train_files)),
        "rewards": rewards,
        "step": str(checkpoint.step),
        "learning rate": f"{run.training(role).optimizer.lr:g}",
    }
    if (score := checkpoint.metrics.get("critic/score/mean")) is not None:
        facts["mean reward at that step"] = f"{score:.4g}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [reinforcement-learning, iiverl]\n{named}---\n\n"
        f"# {run.trainer.experiment_name}\n\nThe {role} of a reinforcement-learning run of iiverl.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )
