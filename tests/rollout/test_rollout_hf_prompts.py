"""Long prompts are kept once for all of their responses, which are the same as with a copy for each."""

from itertools import takewhile
from unittest import mock

import numpy as np
import pytest
import torch

from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.hf.prompts import PAYS, SharedPrompts
from rollout.responses import ask, members, place, respond

GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(0, 256, (length,), generator=GENERATOR).tolist() for length in (40, 70, 64)]
ENDS = {"eos_token_id": [258, *range(0, 320, 10)]}


def responses(engine, **options) -> dict:
    requests = [ask(group, ids, seed=group) for group, ids in enumerate(PROMPTS)]
    return {place(done): done for done in respond(engine, requests, SamplingParams(**options), n=24)}


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *((name, torch.float32, 1e-5) for name in ("qwen2", "qwen2-wide", "llama", "qwen3_moe", "gpt2")),
        *((name, torch.bfloat16, 0.05) for name in ("qwen2", "qwen2-wide")),
    ],
)
def test_responses_are_those_with_a_copy_of_the_prompt(
    name, dtype, tolerance, make_model, make_engine_of, monkeypatch
) -> None:
    path, model = make_model(name)
    engine = make_engine_of(path, model, dtype=dtype, override_config=ENDS)
    made = mock.Mock(wraps=SharedPrompts)
    monkeypatch.setattr("iiverl_core.rollout.hf.forward.SharedPrompts", made)
    shared = responses(engine, max_tokens=30)
    assert made.call_count == 1
    assert len({len(done.token_ids) for done in shared.values()}) > 10
    monkeypatch.setattr("iiverl_core.rollout.hf.forward.PAYS", 10**9)
    copied = responses(engine, max_tokens=30)
    assert made.call_count == 1
    assert shared.keys() == copied.keys() and len(shared) == 72
    for key, done in shared.items():
        pairs = zip(done.token_ids, copied[key].token_ids, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        assert (
            same == len(done.token_ids) or dtype is torch.bfloat16
        )  # whose rounding may choose another token
        np.testing.assert_allclose(done.log_probs[:same], copied[key].log_probs[:same], atol=tolerance)


def test_a_prompt_takes_memory_once_and_as_long_as_it_is_continued(make_model, make_engine_of) -> None:
    engine = make_engine_of(*make_model("qwen2"))
    for group, ids in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=5 * (group + 1), ignore_eos=True)
        for request in members([ask(group, ids)], 24):
            engine.submit(request, params)
    held = []
    while engine.pending:
        engine.step()
        if engine.pending:
            forward = engine._decoding._forward
            held.append((forward._cache.layers[0].keys.shape[:3], len(forward._shared[0]._states[0][0])))
    assert held[0] == ((72, 2, 0), 3)
    assert held[3] == ((72, 2, 3), 3)
    assert held[4] == ((48, 2, 4), 2)
    assert held[-1] == ((24, 2, 13), 1)


def test_short_prompts_and_single_responses_have_copies(make_model, make_engine_of) -> None:
    engine = make_engine_of(*make_model("qwen2"))
    for length, n in ((PAYS // 8 - 1, 9), (100, 1)):
        for request in members([ask(0, [7] * length)], n):
            engine.submit(request, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.step()
        assert not engine._decoding._forward._shared
        engine.step()
        assert not engine.pending
