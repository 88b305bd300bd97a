"""Choose how a model gets the sequences of a micro-batch: packed into one row if its attention allows, or padded.

Models do not declare what their attention needs, so it is tested on a few tokens when a model is built: that packed
sequences do not depend on each other, and that positions which begin again are used.
"""

import logging
from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from iiverl_core.config import FSDPConfig
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError
from iiverl_core.training import LayoutKind, ModelSpec
from iiverl_core.training.spans import Segment
from iiverl_core.training.vision import reads_images, text_model, vision_tower
from iiverl_fsdp.attention import FLASH, PACKED, PADDED, Observations, attention_arguments, observe
from iiverl_fsdp.value_model import ValueModel

FIRST, SECOND = 3, 2  # tokens of two sequences in a row
WINDOWED, FULL = "sliding_attention", "full_attention"

logger = logging.getLogger(__name__)


def attention_candidates(transformer: PreTrainedModel, spec: ModelSpec) -> list[str]:
    """List the attention functions that a model, not sharded yet, can use for packed rows, the preferred one first.

    torch's kernels come first; flash-attn is for models that need more of attention.
    """
    assert isinstance(spec.parallel, FSDPConfig)
    takes_keywords = any(
        each.kind is Parameter.VAR_KEYWORD for each in signature(transformer.forward).parameters.values()
    )
    if spec.model.use_remove_padding is False or not takes_keywords:
        return []
    dtype = torch_dtype(spec.parallel.mixed_precision.param_dtype)
    flash = spec.device.type == "cuda" and dtype.itemsize == 2 and is_flash_attn_2_available()
    flash = flash and spec.sequence_split == 1  # it does not exchange heads with other processes
    flash = flash and not reads_images(
        transformer.config
    )  # its bounds of sequences would go to the tower too
    usable = [name for name in ([PACKED, FLASH] if flash else [PACKED]) if use_attention(transformer, name)]
    use_attention(transformer, PADDED)
    return usable


def choose_layout(
    model: nn.Module, transformer: PreTrainedModel, candidates: Sequence[str], spec: ModelSpec
) -> LayoutKind:
    """Test attention functions for packed rows in `transformer`, a part of `model`, and choose the layout of its inputs.

    All processes take part.

    Raises:
        ConfigError: packing is demanded, and the model cannot do it.
    """
    problem = "does not use the attention interface of transformers"
    if spec.model.use_remove_padding is False:
        problem = "has use_remove_padding: false"
    for name in candidates:
        use_attention(transformer, name)
        found = _problem(model, transformer, spec.device)
        if found is None:
            return "shared" if name == PACKED else "packed"
        problem = found
    use_attention(transformer, PADDED)
    if spec.model.use_remove_padding is False and spec.sequence_split == 1:
        return "padded"
    message = (
        f"the {spec.role} model '{spec.model.path}' {problem}, so its sequences cannot be packed into one row"
    )
    if spec.sequence_split > 1:
        raise ConfigError(
            f"{message}, nor be split over {spec.sequence_split} devices: set its ulysses_sequence_parallel_size to 1"
        )
    if spec.model.use_remove_padding:
        raise ConfigError(f"{message}: set use_remove_padding to false in its section `model`")
    if dist.get_rank() == 0:
        logger.warning("%s; they are padded", message)
    return "padded"


def transformer_blocks(transformer: PreTrainedModel) -> list[nn.Module]:
    """List the blocks of a model, sharded or not."""
    names = set(transformer._no_split_modules or ())
    # Sharding prepends a class of FSDP to a block's own.
    return [m for m in transformer.modules() if names & {base.__name__ for base in type(m).__mro__}]


def use_attention(transformer: PreTrainedModel, name: str) -> bool:
    """Set the attention function of a model, except for its vision tower; return whether the model can use it."""
    try:
        transformer.set_attn_implementation(name)
    except ValueError:  # its class does not support flash-attn
        return False
    if reads_images(transformer.config):
        vision_tower(transformer).set_attn_implementation(PADDED)
    return text_model(transformer).config._attn_implementation == name


def _problem(model: nn.Module, transformer: PreTrainedModel, device: torch.device) -> str | None:
    """Say what is wrong with packed rows in this model, or None.

    Rounding is tolerated: experts of a mixture may get other batches of tokens.
    """
    blocks = transformer_blocks(transformer)
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0])[0, FIRST:])

    hook = (blocks[-1] if blocks else transformer).register_forward_hook(keep)
    try:
        runs = [
            _run(model, transformer, neighbour, last, device)
            for neighbour, last in ((0, SECOND - 1), (1, SECOND - 1), (1, 2 * SECOND))
        ]
    finally:
        hook.remove()
    if problems := runs[0].problems:
        return problems[0]
    allowed = 16 * torch.finfo(seen[0].dtype).eps * seen[0].abs().max()
    if (seen[0] - seen[1]).abs().max() > allowed:
        return "mixes sequences that are packed into one row"
    keys, with_other_position = runs[1].last_keys, runs[2].last_keys
    if keys and all(torch.equal(*pair) for pair in zip(keys, with_other_position, strict=True)):
        return "ignores positions that begin again"
    return _mask_problem(transformer, runs[0].windows)


def _mask_problem(transformer: PreTrainedModel, windows: list[int | None]) -> str | None:
    """Say which attention the model has by a mask only, which packed rows do without."""
    if text_model(transformer).config._attn_implementation != PACKED:
        return None
    config = transformer.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        windowed = window is not None and getattr(config, "use_sliding_window", True)
        kinds = [WINDOWED if windowed else FULL]
    if other := set(kinds) - {WINDOWED, FULL}:
        return f"has layers with {min(other)}"
    if WINDOWED in kinds and not any(windows):
        return "does not tell its attention the sliding window"
    return None


@torch.no_grad()
def _run(
    model: nn.Module, transformer: PreTrainedModel, neighbour: int, last: int, device: torch.device
) -> Observations:
    """Run two sequences in one row, the first of the token `neighbour`, the second's last token at position `last`."""
    ids = torch.tensor([[neighbour] * FIRST + [2] * SECOND], device=device)
    positions = torch.tensor([[*range(FIRST), *range(SECOND - 1), last]], device=device)
    segments = (Segment(0, FIRST), Segment(FIRST, SECOND))
    attention = attention_arguments(transformer, segments, device)
    row = column = ids.new_zeros(1)
    with observe() as observed:
        if isinstance(model, ValueModel):
            model(ids, positions, row, column, **attention)
        else:
            wanted = {"entropy": False, "entropy_gradient": False}
            model(ids, positions, row, column, ids[0, -1:], 1.0, **wanted, **attention)
    return observed
