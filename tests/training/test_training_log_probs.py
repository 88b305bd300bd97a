"""Log-probs, entropy, and both layouts of sequences."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.training.layout import lay_out
from iiverl_core.training.log_probs import token_log_probs

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


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6), st.booleans())
def test_layouts_find_the_position_before_each_response_token(lengths: list, packed: bool) -> None:
    """With 'logits' that hold the input itself, what is picked is the token before each target."""
    prompts = [100 * i + np.arange(p) for i, (p, _) in enumerate(lengths, 1)]
    responses = [100 * i + p + np.arange(r) for i, (p, r) in enumerate(lengths, 1)]
    layout = lay_out(prompts, responses, packed=packed, device=CPU)
    ids = layout.input_ids_BL
    kept = ids[:, -layout.keep :] if isinstance(layout.keep, int) else ids[:, layout.keep]
    picked = layout.pick(kept[..., None])[:, 0]
    assert torch.equal(layout.targets_T, torch.from_numpy(np.concatenate(responses)))
    assert torch.equal(picked, layout.targets_T - 1)
    if packed:
        assert layout.position_ids_BL is not None
        assert ids.shape == (1, sum(p + r for p, r in lengths))
        starts = (layout.position_ids_BL[0] == 0).sum()
        assert starts == len(lengths)
