"""Compile the transformer blocks of a sharded model (`fsdp_config.compile_blocks`).

Each block is compiled in place, for inputs of all lengths, inside of what FSDP and gradient checkpointing do before and
after it. Blocks of a kind share their code. torch.compile does so at the first inputs, whose lengths decide how sums are
divided: made-up micro-batches of fixed lengths (`rehearsals`) come first in every run, so that numbers do not depend on
where a run began, and what cannot be compiled fails at the start.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from iiverl_core.config import ROLE_KEYS
from iiverl_core.errors import ConfigError
from iiverl_core.samples import TokenSequence
from iiverl_core.training import LayoutKind, MicroBatch, ModelSpec
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.vision import text_model
from iiverl_fsdp.attention import APART, COMPILED, PACKED, register_apart
from iiverl_fsdp.packing import transformer_blocks, use_attention

LENGTHS = {"cuda": (480, (251, 393, 937)), "cpu": (60, (31, 49, 117))}
"""Tokens of a prompt and of its responses, by type of device.

Numbers of tokens that are made of them differ, and are odd, unlike a model's sizes: torch.compile would take equal sizes
for sizes that are always equal.
"""
RECOMPILE_LIMIT = 64
"""Variants of a block's code: with gradients or without, kinds of layers, dtypes, models of several roles."""


def compile_blocks(transformer: PreTrainedModel, *, kernel: bool) -> None:
    """Compile all blocks over tokens, at their next inputs; `kernel` tells that torch's kernel computes all attention."""
    import torch._dynamo.config as limits

    if text_model(transformer).config._attn_implementation == PACKED:
        if not kernel:
            register_apart()
        use_attention(transformer, COMPILED if kernel else APART)
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    for block in transformer_blocks(text_model(transformer)):
        block.compile(dynamic=True)


def rehearsals(layout: LayoutKind, device: torch.device) -> list[MicroBatch]:
    """Make micro-batches that have different code: with a shared prompt, which serves all packed rows; of one padded row."""
    prompt, responses = LENGTHS[device.type]

    def batch(lengths: Sequence[int]) -> MicroBatch:
        sequences = [
            TokenSequence.single_turn(
                np.zeros(prompt, np.int64), np.full(n, i, np.int64), np.zeros(n, np.float32)
            )
            for i, n in enumerate(lengths, start=1)
        ]
        count = len(lengths)
        return make_micro_batch(sequences, {}, [0.0] * count, groups=[0] * count, device=device)

    return [batch(responses)] + ([batch(responses[:1])] if layout == "padded" else [])


@contextmanager
def compiling(spec: ModelSpec) -> Iterator[None]:
    """Report what torch.compile cannot do in the block as an error of the configuration."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"the blocks of the {spec.role} model '{spec.model.path}' cannot be compiled ({lines[0] if lines else type(error).__name__}): "
            f"set {ROLE_KEYS[spec.role].fsdp}.compile_blocks to false, or see that a C++ compiler is installed"
        ) from error
