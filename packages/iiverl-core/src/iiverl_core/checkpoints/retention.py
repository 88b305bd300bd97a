"""Select the checkpoints of a run to keep, and delete the others.

verl limits the checkpoints of actor and critic separately, and may delete the folder of only one role. A checkpoint
without one of its roles cannot be resumed, so iiverl keeps or deletes whole checkpoints, by the smaller limit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from iiverl_core.checkpoints.manifest import Checkpoint
from iiverl_core.checkpoints.storage import checkpoints, delete


def keep_limit(actor: int | None, critic: int | None, *, only_last: bool = False) -> int | None:
    """Return the number of checkpoints to keep; None for all.

    Args:
        actor: `trainer.max_actor_ckpt_to_keep`.
        critic: `trainer.max_critic_ckpt_to_keep`; pass None for a run without a critic.
        only_last: `trainer.remove_previous_ckpt_in_save`.
    """
    limits = [limit for limit in (actor, critic) if limit is not None]
    return min([*limits, *([1] if only_last else [])], default=None)


def best(known: Sequence[Checkpoint], metric: str) -> Checkpoint | None:
    """Find the checkpoint with the highest value of a metric, the newest if tied; None if none has a value.

    The value is in each checkpoint's manifest, so the best is known after a restart too.
    """
    measured = [checkpoint for checkpoint in known if metric in checkpoint.metrics]
    return max(measured, key=lambda each: (each.metrics[metric], each.serial), default=None)


def superfluous(
    known: Sequence[Checkpoint], limit: int | None, best_metric: str | None = None
) -> list[Checkpoint]:
    """Select the checkpoints to delete, oldest first.

    The newest `limit` are kept, and also the best by `best_metric`. The newest is always kept.
    """
    if limit is None:
        return []
    ordered = sorted(known, key=lambda checkpoint: checkpoint.serial)
    kept = {checkpoint.serial for checkpoint in ordered[-max(limit, 1) :]}
    if best_metric is not None and (best_checkpoint := best(known, best_metric)):
        kept.add(best_checkpoint.serial)
    return [checkpoint for checkpoint in ordered if checkpoint.serial not in kept]


def prune(
    root: Path, limit: int | None, best_metric: str | None = None, *, warn: Callable[[str], None]
) -> list[Checkpoint]:
    """Delete superfluous checkpoints of a run, and return them; call this after a newer one is published.

    Folders without a valid manifest are neither counted nor deleted. A checkpoint that cannot be deleted produces a
    warning, since it only costs space.
    """
    deleted = []
    for checkpoint in superfluous(checkpoints(root), limit, best_metric):
        try:
            delete(checkpoint.folder)
        except OSError as error:
            warn(f"the old checkpoint {checkpoint.folder} could not be deleted: {error}")
        else:
            deleted.append(checkpoint)
    return deleted
