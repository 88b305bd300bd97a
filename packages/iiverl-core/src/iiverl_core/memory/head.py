"""Memory of a policy's head, whose logits exist for a tile of tokens × vocabulary entries at a time (`training/head.py`)."""

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.activations import Work
from iiverl_core.memory.layout import Layout, Stage

CPU_TILE = (1024, 2**20)
"""Number of tokens, unless the vocabulary is small, and of logits per tile on a CPU, whose caches hold about so much."""

DEVICE_TILE = (4096, 2**25)
"""The same on other devices, which need large matrices to be busy: 128 MiB in fp32."""

FP32 = 4


def tile_size(tokens: int, vocabulary: int, *, cpu: bool) -> tuple[int, int]:
    """Return the largest number of tokens and of vocabulary entries of a tile, for all the tokens and entries there are.

    Tiles of a small vocabulary have more tokens.
    """
    rows, logits = CPU_TILE if cpu else DEVICE_TILE
    rows = max(1, min(tokens, max(rows, logits // max(vocabulary, 1))))
    return rows, max(1, min(vocabulary, logits // rows))


def head_memory(
    facts: ModelFacts, layout: Layout, stage: Stage, work: Work, *, trained: bool, frozen: bool = False
) -> int:
    """Count the bytes of a policy's head on the stage that has it, without the whole gradient of its weight.

    These are the hidden states that predict response tokens, and two arrays of a tile's logits in fp32. In training there
    are also the gradient of these hidden states and, unless the weight is `frozen`, that of the weight for a tile's
    vocabulary entries, in fp32, and at the end of a tile its gradients in the dtype of the weights.
    """
    if layout.pipeline > 1 and stage == "first":
        return 0
    tokens = round(work.responses / layout.context)
    vocabulary = round(facts.vocabulary / layout.tensor)
    rows, columns = tile_size(tokens, vocabulary, cpu=False)
    size, width = layout.weight_bytes, facts.hidden_size
    states, tile = size * tokens * width, 2 * FP32 * rows * columns
    if not trained:
        return states + tile
    if frozen:
        return states + FP32 * tokens * width + tile
    tile = max(tile, size * columns * (rows + width))
    return states + FP32 * (tokens + columns) * width + tile
