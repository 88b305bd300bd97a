"""Untrained tokens between trained ones (tool results) change no gradient but through what the model makes of them.

The model here is a table: whatever stands before a trained token, its logits and value are those of the table. So
sequences with untrained tokens interleaved must have the gradient, with respect to the table, of those without.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.algorithms import Estimator, PolicyLoss, find_estimator, find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.cluster.advantages import compute_advantages, select_tokens
from iiverl_core.cluster.store import LocalStore, open_all, put_all
from iiverl_core.config import build, run_config
from iiverl_core.controller.batch import divide_for_training, with_arrays
from iiverl_core.registry import ESTIMATORS, POLICY_LOSSES
from iiverl_core.samples import ROLLOUT_LOG_PROBS, SequenceRef, TokenSequence
from iiverl_core.training import Outputs
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.layout import lay_out
from iiverl_core.training.log_probs import token_log_probs
from iiverl_core.training.losses import actor_loss, critic_loss
from iiverl_core.training.planning import Packing
from rollouts import id_of

CPU = torch.device("cpu")
VOCABULARY = 5
PER_GROUP = 3
ARRAYS = ("old_log_probs", "ref_log_probs", "values", ROLLOUT_LOG_PROBS)
RUN = run_config(
    build(
        {
            "algorithm": {"adv_estimator": "gae", "gamma": 0.9, "lam": 0.8},
            "actor_rollout_ref": {
                "actor": {
                    "entropy_coeff": 0.1,
                    "use_kl_loss": True,
                    "policy_loss": {
                        "clip_cov_ratio": 0.3,
                        "clip_cov_lb": -9.0,
                        "clip_cov_ub": 9.0,
                        "kl_cov_ratio": 0.3,
                    },
                }
            },
            "critic": {"cliprange_value": 0.5},
        }
    )
)
CORRECTION = RolloutCorrection(importance="token", cap=1.5, rejection="geometric", low=0.5, high=2.0)


def interleaved(sequence: TokenSequence, rng: np.random.Generator) -> TokenSequence:
    """The sequence with up to three untrained tokens behind each of its tokens."""
    at = np.repeat(np.arange(len(sequence.token_ids)), rng.integers(0, 4, len(sequence.token_ids))) + 1
    return TokenSequence(
        np.insert(sequence.token_ids, at, rng.integers(0, VOCABULARY, len(at))),
        np.insert(sequence.loss_mask, at, False),
        np.insert(sequence.log_probs, at, 0.0),
    )


class Step:
    """The rollouts of a step, the table that stands for the model, and what a step computes from them."""

    def __init__(self, trained: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sequences = [
            TokenSequence.single_turn(
                rng.integers(0, VOCABULARY, rng.integers(1, 4)),
                rng.integers(0, VOCABULARY, n),
                rng.normal(-1.6, 0.3, n).astype(np.float32),
            )
            for n in trained
        ]
        self.scores = rng.normal(size=len(trained)).astype(np.float32).tolist()
        self.baselines = rng.normal(size=len(trained)).astype(np.float32).tolist()
        self.arrays = {
            name: [rng.normal(-1.6, 0.3, n).astype(np.float32) for n in trained]
            for name in ARRAYS
            if name != ROLLOUT_LOG_PROBS
        }
        self.logits = [torch.from_numpy(rng.normal(size=(n, VOCABULARY)).astype(np.float32)) for n in trained]
        self.values = [torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in trained]

    def gradient(
        self, sequences: list[TokenSequence], estimator: Estimator, loss: PolicyLoss | None, *, packed: bool
    ) -> Tensor:
        """The gradient of the table, by the path of a real step; a `loss` of None is the critic's."""
        store = LocalStore()
        table = [x.clone().requires_grad_() for x in (self.logits if loss else self.values)]
        handles = put_all(store, sequences)
        refs = [
            SequenceRef(id_of(i // PER_GROUP, i % PER_GROUP), handle, len(each.token_ids), each.trained)
            for i, (handle, each) in enumerate(zip(handles, sequences, strict=True))
        ]
        for name, arrays in self.arrays.items():
            refs = with_arrays(refs, **{name: put_all(store, arrays)})
        baselines = self.baselines if estimator.greedy_baseline else None
        advantages = compute_advantages(RUN, store, estimator, refs, self.scores, baselines, kl_coef=0.1)
        refs = with_arrays(refs, advantages=advantages.advantages)
        refs = with_arrays(refs, returns=advantages.returns)
        names = [*self.arrays, "advantages", "returns"]
        if loss is not None and loss.select_tokens is not None:
            current = [
                logits.log_softmax(-1)[range(len(logits)), each.token_ids[each.loss_mask]].numpy()
                for logits, each in zip(self.logits, sequences, strict=True)
            ]
            refs = with_arrays(refs, log_probs=put_all(store, current))
            refs = with_arrays(refs, token_mask=select_tokens(RUN, store, loss, refs))
            names.append("token_mask")
        division = divide_for_training(
            refs,
            1,
            Packing(sequences=2),
            balanced=True,
            loss_agg_mode=(loss and loss.loss_agg_mode) or "seq-mean-token-mean",
            max_tokens_norm=8,
            arrays=(),
        )
        (batch,) = division.batches
        for positions in batch.micro_batches:
            members = [division.positions[0][i] for i in positions]
            arrays = {name: open_all(store, [refs[i].arrays[name] for i in members]) for name in names}
            arrays[ROLLOUT_LOG_PROBS] = [sequences[i].log_probs[sequences[i].loss_mask] for i in members]
            micro_batch = make_micro_batch(
                [sequences[i] for i in members],
                arrays,
                [batch.weights[i] for i in positions],
                inv_num_tokens=batch.inv_num_tokens,
                device=CPU,
            )
            layout = lay_out(micro_batch.sequences, "packed" if packed else "padded", CPU)
            output_T = torch.cat([table[i] for i in members])
            noise = torch.full((*layout.input_ids_BL.shape, *output_T.shape[1:]), 77.0)  # never looked at
            whole = noise.index_put((layout.rows_T, layout.columns_T), output_T)
            if loss is None:
                outputs = Outputs(values_T=whole[layout.rows_T, layout.columns_T])
                value, _ = critic_loss(RUN.loss)(outputs, micro_batch)
            else:
                logits_TV = whole[layout.rows_T, layout.columns_T]
                log_probs_T, entropy_T = token_log_probs(logits_TV, layout.targets_T, 1.0, entropy=True)
                outputs = Outputs(log_probs_T=log_probs_T, entropy_T=entropy_T)
                value, _ = actor_loss(RUN.loss, loss, CORRECTION)(outputs, micro_batch)
            value.backward()
        return torch.cat([x.grad.flatten() for x in table if x.grad is not None])


LENGTHS = st.lists(st.integers(1, 6), min_size=PER_GROUP, max_size=PER_GROUP * 2)
LENGTHS = LENGTHS.filter(
    lambda lengths: len(lengths) % PER_GROUP != 1
)  # a group of one is compared with nothing


@pytest.mark.parametrize(
    ("estimator", "loss"),
    [*((name, "vanilla") for name in ESTIMATORS), *(("gae", name) for name in (*POLICY_LOSSES, "critic"))],
)
@given(trained=LENGTHS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_interleaved_untrained_tokens_change_no_gradient(
    estimator: str, loss: str, trained: list[int], seed: int
) -> None:
    step = Step(trained, seed)
    rng = np.random.default_rng(seed)
    chosen = find_estimator(estimator), None if loss == "critic" else find_policy_loss(loss)
    plain = step.gradient(step.sequences, *chosen, packed=False)
    mixed = [interleaved(sequence, rng) for sequence in step.sequences]
    for packed in (False, True):
        torch.testing.assert_close(step.gradient(mixed, *chosen, packed=packed), plain, rtol=1e-4, atol=1e-6)


def test_gradients_of_this_model_tell_tokens_apart() -> None:
    """What the test above compares is not zero, and depends on every part."""
    step = Step([3, 5, 2], 0)
    gradient = step.gradient(step.sequences, find_estimator("gae"), find_policy_loss("vanilla"), packed=False)
    assert (gradient.abs() > 1e-6).all()
    step.arrays["old_log_probs"][1][2] -= 0.05
    moved = step.gradient(step.sequences, find_estimator("gae"), find_policy_loss("vanilla"), packed=False)
    assert not torch.equal(moved, gradient)
