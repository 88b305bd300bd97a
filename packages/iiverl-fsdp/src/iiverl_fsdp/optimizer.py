"""AdamW over the shards of a model, with its states allocated before the first step."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from iiverl_core.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over all parameters that are trained, whose states are zero.

    By default AdamW allocates its states in the first step. Here they are allocated at once, since engines take most of the
    remaining memory when they start: a run that does not fit then fails at its start. The fused kernel runs on a CPU
    too, where it is the only one for sharded parameters that is not a chain of single operations; it rounds some
    results differently in the last bit.
    """
    trained = [parameter for _, parameter in trained_parameters(model)]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )
    for parameter in trained:
        optimizer.state[parameter] = _no_steps(parameter)
    return optimizer


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are not frozen, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def forget(optimizer: torch.optim.AdamW) -> None:
    """Set all states to what they were before the first step, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _no_steps(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Create a parameter's states as AdamW does: a count of steps on its device, and moments like it."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}
