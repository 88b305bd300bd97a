"""Export a model of a checkpoint as a folder that transformers and vLLM read, on a CPU, in one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor

from iiverl_core.checkpoints import CONFIG_FILE, Checkpoint, read_json, verify
from iiverl_core.cluster.model_runner import model_spec
from iiverl_core.cluster.rendezvous import join_process_group
from iiverl_core.config import Config, MegatronConfig, RunConfig, run_config
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import CheckpointError, ConfigError
from iiverl_core.registry import BACKENDS
from iiverl_core.training import ModelSpec, Role, TrainingBackend
from iiverl_core.training.model_folder import write_description, write_safetensors

WHOLE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
}
"""The Megatron layout of a model that lies in one process."""


def export(
    folder: Path, target: Path, role: Role = "actor", dtype: str | None = None, *, log: Callable[[str], None]
) -> None:
    """Write a trained model of a checkpoint, its configuration, its tokenizer and a model card into `target`.

    The model is held in CPU memory as a whole.

    Args:
        dtype: `bf16`, `fp16` or `fp32`; by default that of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is not valid, or does not hold the model.
        ConfigError: `target` is not empty, or the configuration or tokenizer cannot be read.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; name a new folder")
    log(f"verifying {folder}")
    checkpoint = verify(folder)
    if role not in checkpoint.roles:
        raise CheckpointError(f"{folder} holds no {role}, but {', '.join(sorted(checkpoint.roles))}")
    run = run_config(Config.model_validate(read_json(folder / CONFIG_FILE)))
    log(f"reading the {role}")
    with _alone():
        backend: type[TrainingBackend] = BACKENDS[run.backend].load()
        model = backend(_whole(run, role))
        model.load(folder / role)
        log(f"writing {target}")
        write_safetensors(_cast(model.named_weights(), dtype), target, write=True)
    write_description(run, role, target, dtype)
    (target / "README.md").write_text(_card(run, role, checkpoint), encoding="utf-8")


@contextmanager
def _alone() -> Iterator[None]:
    """Make a process group of this process alone."""
    with TemporaryDirectory(prefix="iiverl-") as folder:
        join_process_group((Path(folder) / "rendezvous").as_uri(), 0, 1, "cpu")
        try:
            yield
        finally:
            dist.destroy_process_group()


def _whole(run: RunConfig, role: Role) -> ModelSpec:
    """Describe the model in one process, without an optimizer."""
    spec = model_spec(run.roles[role], torch.device("cpu"))
    parallel = spec.parallel
    if isinstance(parallel, MegatronConfig):
        parallel = parallel.model_copy(update=WHOLE)
    return replace(spec, parallel=parallel, optim=None, offload=type(spec.offload)())


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
