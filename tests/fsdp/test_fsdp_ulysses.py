"""Sequences split over several processes give the outputs and gradients of one process, reduced whenever they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForSequenceClassification

from fsdp.test_fsdp_gradients import (
    ARCHITECTURES,
    ARRAYS,
    IN_ORDER,
    architecture_paths,
    data,
    gradient_of,
    in_fp64,
    norms_in_fp64,
    plan,
    spec,
)
from iiverl_core.algorithms import find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.config import ModelConfig
from iiverl_core.errors import ConfigError
from iiverl_core.training import Role
from iiverl_core.training.batching import dummy_micro_batch
from iiverl_core.training.losses import actor_loss, critic_loss
from iiverl_core.training.planning import Packing
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks
from rollouts import loss_config

__all__ = ["architecture_paths"]  # a fixture
CPU = torch.device("cpu")


@contextmanager
def as_data_rank(backend: FSDPBackend) -> Iterator[None]:
    """Let work be divided over data-parallel ranks, each of several processes."""
    rank = backend.parallel_rank
    with (
        mock.patch.object(dist, "get_rank", return_value=rank.data_rank),
        mock.patch.object(dist, "get_world_size", return_value=rank.data_size),
    ):
        yield


@norms_in_fp64()
def outputs_and_gradient(path: str, role: Role, split: int, packing: Packing) -> dict[str, torch.Tensor]:
    """In fp64: the outputs of this rank's micro-batches by sequence, and the whole gradient."""
    backend = in_fp64(path, True, role, sequence_split=split)
    assert backend.layout == "shared"
    zeros = [np.zeros(t.trained) for t in data()[0]]
    with as_data_rank(backend):
        batches = plan(packing, "token-mean", IN_ORDER, {"values": zeros, "returns": [x - 1 for x in zeros]})
    # Two tokens: with four processes, some have none of them.
    batches.append(dummy_micro_batch((*ARRAYS, "values", "returns"), CPU))
    found = {}
    for batch, outputs in zip(batches, backend.forward(batches, entropy=True), strict=True):
        for name in ("log_probs_T", "entropy_T", "values_T", "scores_B"):
            x_T = getattr(outputs, name)
            if x_T is not None:
                parts = x_T.split(1) if name == "scores_B" else batch.segments.split(x_T)
                found |= {
                    f"{name} {sequence.token_ids.tobytes()}": part
                    for sequence, part in zip(batch.sequences, parts, strict=True)
                }
    if role == "reward":
        return found
    config = loss_config(use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.05)
    loss = (
        critic_loss(config)
        if role == "critic"
        else actor_loss(config, find_policy_loss("vanilla"), RolloutCorrection())
    )
    return found | {"gradient": gradient_of(backend, batches, loss)}


def all_outputs(
    paths: dict[str, str], role: Role, split: int, packing: Packing
) -> dict[str, dict[str, torch.Tensor]]:
    return {name: outputs_and_gradient(path, role, split, packing) for name, path in paths.items()}


@pytest.fixture(scope="module")
def reward_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with a tiny random reward model."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    path = tmp_path_factory.mktemp("reward")
    model.save_pretrained(path)
    return {"reward": str(path)}


def compare(processes: Ranks, paths: dict[str, str], role: Role, split: int, packing: Packing) -> None:
    """Compare each process, and all together, with this one alone, whose sequences go through the model one by one."""
    results = processes.run(all_outputs, paths, role, split, packing)
    for name, path in paths.items():
        expected = outputs_and_gradient(path, role, 1, Packing(sequences=1))
        tolerance = ARCHITECTURES[name][1] if name in ARCHITECTURES else 1e-11
        assert {key for result in results for key in result[name]} == expected.keys()
        for result in results:
            for key, tensor in result[name].items():
                assert expected[key].abs().max() > 1e-4 or "log_probs" not in key
                torch.testing.assert_close(
                    tensor,
                    expected[key],
                    rtol=1e3 * tolerance,
                    atol=tolerance,
                    msg=lambda m, n=name, k=key: f"{n}, {k[:12]}: {m}",
                )


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_two_processes_share_sequences(
    one_rank, ranks: Callable[..., Ranks], architecture_paths: dict[str, str], role: Role
) -> None:
    compare(ranks(2), architecture_paths, role, 2, Packing(tokens=40))


def test_a_reward_model_scores_split_sequences(
    one_rank, ranks: Callable[..., Ranks], reward_paths: dict[str, str]
) -> None:
    compare(ranks(2), reward_paths, "reward", 2, Packing())


@pytest.mark.slow
@pytest.mark.parametrize("split", [2, 4])
def test_four_processes_share_sequences(
    one_rank, ranks: Callable[..., Ranks], architecture_paths: dict[str, str], split: int
) -> None:
    """All four, which have more processes than heads of keys; and two pairs, each with its own sequences."""
    compare(ranks(4), architecture_paths, "actor", split, Packing(tokens=60))


def test_heads_have_to_be_divisible(one_rank, architecture_paths: dict[str, str]) -> None:
    path = next(iter(architecture_paths.values()))
    with (
        mock.patch("iiverl_fsdp.backend.SequenceGroup"),
        pytest.raises(ConfigError, match="4 attention heads"),
    ):
        FSDPBackend(replace(spec(path, packed=True), sequence_split=3))


def test_sequences_that_are_not_packed_cannot_be_split(one_rank, architecture_paths: dict[str, str]) -> None:
    path = next(iter(architecture_paths.values()))
    with (
        mock.patch("iiverl_fsdp.backend.SequenceGroup"),
        pytest.raises(ConfigError, match="nor be split over 2"),
    ):
        FSDPBackend(replace(spec(path), sequence_split=2))


# Devices that share sequences, keys of the model, and groups of weights that FSDP reduces: two blocks, and the others.
CASES = {
    "all weights": (1, {"enable_gradient_checkpointing": True}, 3),
    "adapters": (1, {"lora_rank": 2}, 2),
    "split sequences": (2, {}, 3),
}
REDUCE = next(name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name))


def updates(path: str, names: list[str]) -> dict[str, tuple[int, list[int], float, float]]:
    """Of each of these cases: micro-batches, reductions by either setting, the gradient's largest entry and difference."""
    found = {}
    loss = actor_loss(
        loss_config(use_kl_loss=True, kl_loss_coef=0.1), find_policy_loss("vanilla"), RolloutCorrection()
    )
    for name in names:
        split, options, _ = CASES[name]
        gradients, counts = [], []
        for sync in ("micro_batch", "mini_batch"):
            base = spec(path, gradient_sync=sync)
            model = ModelConfig(path=path, **{"enable_gradient_checkpointing": False, **options})
            backend = FSDPBackend(replace(base, model=model, sequence_split=split))
            with as_data_rank(backend):
                batches = plan(Packing(tokens=24), "token-mean", IN_ORDER)
            for _ in range(2):  # nothing is left of the first
                with mock.patch.object(dist, REDUCE, wraps=getattr(dist, REDUCE)) as reduce:
                    backend.forward_backward(batches, loss, entropy=True)
                named = dict(backend.named_gradients())
            gradients.append(torch.cat([each.flatten() for each in named.values()]))
            counts.append(reduce.call_count)
        off = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
        found[name] = (len(batches), counts, gradients[0].abs().max().item(), off.item())
    return found


@pytest.mark.parametrize(
    ("size", "names"),
    [(2, ["all weights", "adapters"]), pytest.param(4, ["split sequences"], marks=pytest.mark.slow)],
)
def test_gradients_reduced_once_are_the_same(
    ranks, tiny_model_path: Path, size: int, names: list[str]
) -> None:
    for found in ranks(size).run(updates, str(tiny_model_path), names):
        assert list(found) == names
        for name, (batches, counts, largest, off) in found.items():
            assert batches > 1, name
            groups = CASES[name][2]
            assert counts == [groups * batches, groups], name
            assert largest > 1e-3, name
            assert off < 1e-6, name
