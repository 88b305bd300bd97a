"""Compiled blocks compute what others do, and are compiled once, when a model is built.

torch.compile traces, differentiates and guards, but does not generate code (`aot_eager`), which takes minutes on a CPU.
The part `train compiled` of `benchmarks/gpu_check.py` generates it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from iiverl_core import activity
from iiverl_core.config import FSDPConfig, ModelConfig, OptimConfig
from iiverl_core.errors import ConfigError
from iiverl_core.samples import TokenSequence
from iiverl_core.training import MicroBatch, ModelSpec, Outputs, Role
from iiverl_core.training.batching import make_micro_batch
from iiverl_fsdp.backend import FSDPBackend

CPU = torch.device("cpu")
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
CASES: dict[str, tuple[Role, dict]] = {
    "packed": ("actor", {}),
}
LENGTHS = ([9, 5, 14], [30], [2, 2, 2, 2, 3], [64, 8])  # of responses in a micro-batch


def spec(path: str, role: Role, model: dict, *, compiled: bool) -> ModelSpec:
    return ModelSpec(
        role=role,
        model=ModelConfig(path=path, **model),
        parallel=FSDPConfig(mixed_precision=FP32, compile_blocks=compiled),
        device=CPU,
        optim=OptimConfig(),
    )


def micro_batches(rank: int) -> list[MicroBatch]:
    """Micro-batches of unlike lengths, half of which have groups with the same prompt."""
    rng = np.random.default_rng(rank)
    batches = []
    for number, lengths in enumerate(LENGTHS):
        prompt = rng.integers(0, 256, 7 + number)
        sequences = [
            TokenSequence.single_turn(prompt, rng.integers(0, 256, n), np.zeros(n, np.float32))
            for n in lengths
        ]
        groups = [0] * len(lengths) if number % 2 == 0 else []
        weights = [float(weight) for weight in rng.normal(size=len(lengths))]
        batches.append(make_micro_batch(sequences, {}, weights, groups=groups, device=CPU))
    return batches


def weighted(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    results = outputs.values_T if outputs.log_probs_T is None else outputs.log_probs_T
    assert results is not None
    total = (results * batch.weights_T.float()).sum()
    return total if outputs.entropy_T is None else total + 0.1 * outputs.entropy_T.square().sum(), {}


def results(model: FSDPBackend) -> dict[str, Tensor]:
    """Everything that a model computes, and its gradient."""
    batches, found = micro_batches(dist.get_rank()), {}
    for adapter in (True, False):
        for i, each in enumerate(model.forward(batches, entropy=True, adapter=adapter)):
            found |= {f"{name} {i} {adapter}": x for name, x in vars(each).items() if x is not None}
    model.forward_backward(batches, weighted, entropy=True)
    return found | dict(model.named_gradients())


@contextmanager
def without_code_generation() -> Iterator[None]:
    compile_in_place = partialmethod(nn.Module.compile, backend="aot_eager")
    with mock.patch.object(nn.Module, "compile", compile_in_place):
        yield


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def compare(path: str) -> dict[str, tuple[int, int, float, float]]:
    """Of each case: graphs that were made when the model was built, and later; the largest result, and difference."""
    found = {}
    for name, (role, model) in CASES.items():
        expected = results(FSDPBackend(spec(path, role, model, compiled=False)))
        before = graphs()
        with without_code_generation():
            compiled = FSDPBackend(spec(path, role, model, compiled=True))
        built = graphs()
        given = results(compiled)
        assert given.keys() == expected.keys()
        off = max(
            ((given[key] - each).abs().max() / each.abs().max().clamp_min(1e-3)).item()
            for key, each in expected.items()
        )
        largest = max(each.abs().max().item() for each in expected.values())
        found[name] = (built - before, graphs() - built, largest, off)
    return found


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_are_compiled_once(ranks, tiny_model_path: Path) -> None:
    for found in ranks(2).run(compare, str(tiny_model_path)):
        for name, (built, later, largest, off) in found.items():
            assert built > 0, name
            assert later == 0, name
            assert largest > 0.1, name
            assert off < 1e-5, name


@torch.library.custom_op("iiverl_test::varlen", mutates_args=())
def kernel(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_keys: int
) -> Tensor:
    """Attend as torch's kernel for variable lengths does, which there is on CUDA only."""
    assert (longest, longest_keys) == (ends.diff().max(), key_ends.diff().max())
    parts = []
    for part, keys in zip(ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        q, k, v = (x[slice(*at)].transpose(0, 1) for x, at in ((query, part), (key, keys), (value, keys)))
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        attended = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


@kernel.register_fake
def _(query: Tensor, *others: object) -> Tensor:
    return torch.empty_like(query)


def varlen_attn(*arguments, scale: float, window_size: tuple[int, int]) -> Tensor:
    assert window_size == (-1, 0)
    assert scale == 16**-0.5
    return torch.ops.iiverl_test.varlen(*arguments)


@pytest.mark.slow
def test_attention_by_a_kernel_is_a_part_of_compiled_blocks(
    one_rank, tiny_model_path: Path, monkeypatch
) -> None:
    model = spec(str(tiny_model_path), "reference", {}, compiled=False)
    model = replace(model, optim=None)
    batches = micro_batches(0)
    expected = FSDPBackend(model).forward(batches)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    for module in ("iiverl_fsdp.attention", "iiverl_core.training.attention"):
        monkeypatch.setattr(f"{module}.has_kernel", lambda query, value: True)
    from torch._dynamo.utils import counters

    before = counters["graph_break"].total()
    with without_code_generation():
        compiled = FSDPBackend(replace(model, parallel=FSDPConfig(mixed_precision=FP32, compile_blocks=True)))
    built = graphs()
    for given, each in zip(compiled.forward(batches), expected, strict=True):
        torch.testing.assert_close(given.log_probs_T, each.log_probs_T, rtol=1e-5, atol=1e-5)
    assert graphs() == built > 0
    assert counters["graph_break"].total() == before


def test_without_a_compiler_the_error_says_what_to_do(one_rank, tiny_model_path: Path, monkeypatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.ref\.fsdp_config\.compile_blocks to false"):
        FSDPBackend(replace(spec(str(tiny_model_path), "reference", {}, compiled=True), optim=None))
    assert activity.current().call is None
