"""Check that sequences packed into one row do not attend to each other.

Packed sequences are distinguished by their positions, which restart at zero. Most models of transformers derive a
block-diagonal mask from that; a few ignore it and compute wrong log-probs and values. Models do not declare it, so it is
tested.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec
from iiverl_fsdp.value_model import ValueModel

FIRST, SECOND = 3, 2  # tokens of two sequences in a row


def check_packing(model: nn.Module, transformer: PreTrainedModel, spec: ModelSpec) -> None:
    """Check that the output of the last block of `transformer`, a part of `model`, does not depend on the packed neighbour.

    All processes take part. Rounding is tolerated: experts of a mixture may get other batches of tokens.

    Raises:
        ConfigError: another neighbour changes the result.
    """
    names = set(transformer._no_split_modules or ())
    # Sharding prepends a class of FSDP to a block's own.
    blocks = [m for m in transformer.modules() if names & {base.__name__ for base in type(m).__mro__}]
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    hook = (blocks[-1] if blocks else transformer).register_forward_hook(keep)
    try:
        for neighbour in (0, 1):
            _run(model, neighbour, spec.device)
    finally:
        hook.remove()
    first, second = (hidden[0, FIRST:].float() for hidden in seen)
    allowed = 16 * torch.finfo(seen[0].dtype).eps * first.abs().max()
    if (first - second).abs().max() > allowed:
        raise ConfigError(
            f"the {spec.role} model '{spec.model.path}' mixes sequences that are packed into one row: set "
            "use_remove_padding to false in its section `model`"
        )


@torch.no_grad()
def _run(model: nn.Module, neighbour: int, device: torch.device) -> None:
    """Run two sequences in one row, the first consisting of the token `neighbour`."""
    ids = torch.tensor([[neighbour] * FIRST + [2] * SECOND], device=device)
    positions = torch.tensor([[*range(FIRST), *range(SECOND)]], device=device)
    at = torch.zeros(1, dtype=torch.long, device=device), positions[0, -1:]
    if isinstance(model, ValueModel):
        model(ids, positions, *at)
    else:
        model(ids, positions, *at, ids[0, -1:], 1.0, entropy=False, entropy_gradient=False)
