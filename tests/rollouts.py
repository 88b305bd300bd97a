"""Rollouts, sequences and losses of which only what a test names matters."""

from typing import Any

import numpy as np
import torch

from iiverl_core.config import LossConfig, build, run_config
from iiverl_core.samples import Handle, Prompt, Rollout, SampleId, SequenceRef, TokenSequence


def id_of(group: int = 0, member: int = 0) -> SampleId:
    return SampleId("train", 1, group, member)


def make_rollout(
    group: int = 0,
    member: int = 0,
    *,
    prompt: Prompt | None = None,
    response_length: int = 5,
    sequences: tuple[SequenceRef, ...] | None = None,
    **more: Any,
) -> Rollout:
    """A rollout of one sequence, unless `sequences` are given."""
    id, row = id_of(group, member), prompt or Prompt(row=group, ids=(1, 2), text="p")
    fields: dict[str, Any] = {
        "text": "r",
        "raw_text": "r<end>",
        "finish_reason": "stop",
        "weights_version": 0,
        "log_prob": -1.0,
        **more,
    }
    length = len(row.ids) + response_length
    return Rollout(
        id, row, sequences=sequences or (SequenceRef(id, Handle(None), length, response_length),), **fields
    )


def mixed_sequences(rng: np.random.Generator, count: int, low: int, high: int) -> list[TokenSequence]:
    """Sequences of uneven lengths with tokens low … high - 1: a single turn, and trained tokens anywhere, by turns."""
    lengths = zip(rng.integers(1, 12, count), rng.integers(1, 20, count), strict=True)
    sequences = []
    for i, (prompt, response) in enumerate(lengths):
        ids = rng.integers(low, high, prompt + response)
        mask = np.arange(len(ids)) >= prompt
        if i % 2:
            mask[1:] = rng.random(len(ids) - 1) < 0.5
            mask[rng.integers(1, len(ids))] = True
        sequences.append(TokenSequence(ids, mask, np.zeros(len(ids), dtype=np.float32)))
    return sequences


def trained_positions(sequence: TokenSequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids as a batch of one, the positions that predict the trained tokens, and these tokens."""
    ids = torch.from_numpy(sequence.token_ids)
    at = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
    return ids[None], at - 1, ids[at]


def loss_config(*, cliprange_value: float = 0.5, **actor: Any) -> LossConfig:
    """The losses of a run with these keys of the actor's section, and this one of the critic's."""
    sections = {"actor_rollout_ref": {"actor": actor}, "critic": {"cliprange_value": cliprange_value}}
    return run_config(build(sections)).loss
