"""Log-probs, entropy, and both layouts of sequences."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.samples import TokenSequence
from iiverl_core.training import LayoutKind
from iiverl_core.training.layout import RowPart, lay_out
from iiverl_core.training.log_probs import token_log_probs
from rollouts import mixed_sequences

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_torch_distributions(temperature: float) -> None:
    logits_TV = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 5
    targets_T = torch.arange(7)
    expected = torch.distributions.Categorical(logits=logits_TV / temperature)
    log_probs_T, entropy_T = token_log_probs(logits_TV, targets_T, temperature, entropy=True)
    torch.testing.assert_close(log_probs_T, expected.log_prob(targets_T))
    torch.testing.assert_close(entropy_T, expected.entropy())
    assert token_log_probs(logits_TV, targets_T, temperature, entropy=False)[1] is None


def test_half_precision_logits_give_single_precision() -> None:
    logits_TV = torch.randn(3, 5, dtype=torch.bfloat16)
    log_probs_T, _ = token_log_probs(logits_TV, torch.zeros(3, dtype=torch.long), 1.0, entropy=False)
    assert log_probs_T.dtype == torch.float32


MASKS = st.lists(st.booleans(), min_size=1, max_size=8).filter(any).map(lambda mask: [False, *mask])


@given(st.lists(MASKS, min_size=1, max_size=6), st.sampled_from(["packed", "padded"]))
def test_layouts_find_the_position_before_each_trained_token(
    masks: list[list[bool]], kind: LayoutKind
) -> None:
    sequences = [
        TokenSequence(100 * i + np.arange(len(mask)), np.array(mask), np.zeros(len(mask)))
        for i, mask in enumerate(masks, 1)
    ]
    layout = lay_out(sequences, kind, CPU)
    ids = layout.input_ids_BL
    trained = np.concatenate([sequence.token_ids[sequence.loss_mask] for sequence in sequences])
    assert torch.equal(layout.targets_T, torch.from_numpy(trained))
    assert torch.equal(ids[layout.rows_T, layout.columns_T], layout.targets_T - 1)
    if kind == "packed":
        assert layout.position_ids_BL is not None
        assert ids.shape == (1, sum(map(len, masks)))
        assert (layout.position_ids_BL[0] == 0).sum() == len(masks)


@given(
    st.lists(st.tuples(st.integers(0, 3), MASKS), min_size=1, max_size=9),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_sequences_of_a_group_share_their_common_prefix(
    members: list[tuple[int, list[bool]]], alike: int, random: Random
) -> None:
    """Each sequence, read along its segments, is itself; what its group has in common is in the row once."""
    groups = [group for group, _ in members]
    sequences = []
    for group, mask in members:
        ids = [100 * group + at if at < alike else random.randrange(1000, 1003) for at in range(len(mask))]
        sequences.append(TokenSequence(np.array(ids), np.array(mask), np.zeros(len(mask))))
    layout = lay_out(sequences, "shared", CPU, groups)
    assert layout.segments is not None and layout.position_ids_BL is not None
    ids, positions = layout.input_ids_BL[0], layout.position_ids_BL[0]
    by_last = {segment.start + segment.length - 1: segment for segment in layout.segments}
    assert sum(segment.length for segment in layout.segments) == len(ids)
    total = 0
    for group in set(groups):
        same = [
            sequence.token_ids.tolist()
            for own, sequence in zip(groups, sequences, strict=True)
            if own == group
        ]
        shortest = min(map(len, same))
        common = next((at for at in range(shortest) if len({ids[at] for ids in same}) > 1), shortest - 1)
        total += sum(map(len, same)) - (len(same) - 1) * min(common, shortest - 1)
    assert len(ids) == total
    at = 0
    for sequence, last in zip(sequences, layout.last_columns_S.tolist(), strict=True):
        start, length, prefix_start, prefix_length = by_last[last]
        read = [*range(prefix_start, prefix_start + prefix_length), *range(start, start + length)]
        assert ids[read].tolist() == sequence.token_ids.tolist()
        assert positions[read].tolist() == list(range(len(read)))
        predicting = [read[i - 1] for i in np.flatnonzero(sequence.loss_mask)]
        assert layout.columns_T[at : at + sequence.trained].tolist() == predicting
        at += sequence.trained


def test_a_first_token_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="first token"):
        lay_out([TokenSequence(np.arange(2), np.array([True, True]), np.zeros(2))], "packed", CPU)


def test_an_entropy_that_is_only_reported_changes_no_bit_of_the_gradient() -> None:
    def gradient(entropy_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)).requires_grad_()
        log_probs_T, entropy_T = token_log_probs(
            logits_TV, torch.arange(7), 0.7, entropy=True, entropy_gradient=entropy_gradient
        )
        assert entropy_T is not None and entropy_T.requires_grad == entropy_gradient
        (log_probs_T - 0.0 * entropy_T).sum().backward()
        assert logits_TV.grad is not None
        return logits_TV.grad, entropy_T.detach()

    for with_gradient, without in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(with_gradient, without)


@given(st.data())
def test_the_parts_of_a_row_make_up_the_row(data) -> None:
    """Each trained token is predicted in one part, by the token before it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequences = mixed_sequences(rng, data.draw(st.integers(1, 5)), 3, 64)
    groups = [i // 2 for i in range(len(sequences))]
    size = data.draw(st.integers(2, 5))
    whole = lay_out(sequences, "shared", CPU, groups)
    parts = [lay_out(sequences, "shared", CPU, groups, RowPart(rank, size)) for rank in range(size)]
    length, width = whole.input_ids_BL.shape[1], parts[0].input_ids_BL.shape[1]
    ids = torch.cat([part.input_ids_BL for part in parts], 1)
    positions = torch.cat([part.position_ids_BL for part in parts], 1)
    assert torch.equal(ids[:, :length], whole.input_ids_BL) and not ids[:, length:].any()
    assert torch.equal(positions[:, :length], whole.position_ids_BL)
    assert sum(segment.length for segment in parts[0].segments) == size * width < length + size
    for name, columns in (("tokens_T", "columns_T"), ("sequences_S", "last_columns_S")):
        found = torch.cat([getattr(part, name) for part in parts])
        assert sorted(found.tolist()) == list(range(len(getattr(whole, columns))))
        for rank, part in enumerate(parts):
            own = getattr(part, name)
            expected = getattr(whole, columns)[own] - rank * width if len(own) else torch.zeros(1, dtype=int)
            assert torch.equal(getattr(part, columns), expected)
            assert part.targets_T.shape == part.columns_T.shape == part.rows_T.shape
            if name == "tokens_T" and len(own):
                assert torch.equal(part.targets_T, whole.targets_T[own])
