"""A head in tiles computes what a head and its logits as a whole compute, in a hundredth of the memory."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory import head
from iiverl_core.memory.activations import Work
from iiverl_core.memory.head import head_memory
from iiverl_core.memory.layout import Layout
from iiverl_core.training.head import IDENTITY, LogitTransform, head_log_probs
from iiverl_core.training.log_probs import token_log_probs
from iiverl_core.training.support import Support
from storages import Storages

TRANSFORMS = {
    "none": IDENTITY,
    "scale": LogitTransform(scale=0.25),
    "softcap": LogitTransform(softcap=3.0),
    "both": LogitTransform(scale=2.0, softcap=5.0),
}
CPU = torch.device("cpu")


def inputs(
    tokens: int, vocabulary: int, *, bias: bool, dtype: torch.dtype, size: int = 6, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Hidden states, a head's weight and perhaps bias, which want gradients, and targets."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, size), (vocabulary, size), *([(vocabulary,)] if bias else [])]
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    return [part.requires_grad_() for part in parts], targets_T


def plain(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    support: Support | None = None,
    entropy: bool,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The logits of all tokens, and their log-probs."""
    logits_TV = F.linear(hidden_TD, weight_VD, bias_V)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) * transform.scale
    if transform.softcap is not None:
        logits_TV = transform.softcap * (logits_TV / transform.softcap).tanh()
    return token_log_probs(
        logits_TV, targets_T, temperature, support=support, entropy=entropy, entropy_gradient=entropy_gradient
    )


def random_support(targets_T: Tensor, vocabulary: int, seed: int) -> tuple[Support, Tensor]:
    """Tokens that were kept, the targets among them, as `Support` and as a mask; at some positions all were."""
    generator = torch.Generator().manual_seed(seed + 1)
    kept_TV = torch.rand((len(targets_T), vocabulary), generator=generator) < 0.4
    kept_TV[torch.arange(len(targets_T)), targets_T] = True
    whole_T = torch.rand(len(targets_T), generator=generator) < 0.3
    counts_T = kept_TV.sum(1).where(~whole_T, 0)
    ids_K = torch.cat(
        [kept.nonzero()[:, 0] for kept, whole in zip(kept_TV, whole_T, strict=True) if not whole]
        or [targets_T[:0]]
    )
    return Support.of(counts_T.numpy(), ids_K.int().numpy(), CPU), kept_TV | whole_T[:, None]


@pytest.mark.parametrize("function", [head_log_probs, plain])
def test_a_support_leaves_out_all_other_tokens(function: Callable[..., Any]) -> None:
    """As if the logits of the other tokens were minus infinity; their rows of the head get no gradient."""
    parts, targets_T = inputs(9, 23, bias=False, dtype=torch.float64)
    support, kept_TV = random_support(targets_T, 23, seed=5)
    with tiles(4, 4 * 5):
        log_probs_T, entropy_T = function(*parts, targets_T, 0.7, support=support, entropy=True)
    logits_TV = (parts[0] @ parts[1].T / 0.7).masked_fill(~kept_TV, -torch.inf)
    p_TV = logits_TV.softmax(-1)
    torch.testing.assert_close(log_probs_T, p_TV[torch.arange(9), targets_T].log())
    torch.testing.assert_close(entropy_T, torch.special.entr(p_TV).sum(-1))
    row = int((~kept_TV).any(1).nonzero()[0])
    (gradient_VD,) = torch.autograd.grad(log_probs_T[row], parts[1])
    assert torch.equal(gradient_VD.any(1), kept_TV[row])


def test_the_support_at_some_positions() -> None:
    targets_T = torch.arange(12) % 7
    support, kept_TV = random_support(targets_T, 7, seed=2)
    for at in (torch.tensor([3, 0, 11]), targets_T > 3):
        excluded_RC = support.at(at).excluded(slice(0, 12), 0, 7)
        assert torch.equal(excluded_RC, ~kept_TV[at])


@contextmanager
def tiles(rows: int, logits: int) -> Iterator[None]:
    with mock.patch.object(head, "CPU_TILE", (rows, logits)):
        yield


def results(
    function: Callable[..., Any], parts: list[Tensor], targets_T: Tensor, temperature: float, **more: Any
) -> list[Tensor]:
    """Log-probs, entropy, and the gradient of a sum of both with some weights."""
    hidden_TD, weight_VD, *bias = parts
    options = {"bias_V": bias[0] if bias else None, "entropy": True, **more}
    log_probs_T, entropy_T = function(hidden_TD, weight_VD, targets_T, temperature, **options)
    weights_T = torch.linspace(-1, 2, len(targets_T), dtype=log_probs_T.dtype)
    total = weights_T @ log_probs_T + weights_T.flip(0).square() @ entropy_T
    return [log_probs_T.detach(), entropy_T.detach(), *torch.autograd.grad(total, parts)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 23),
    rows=st.integers(1, 10),
    logits=st.integers(1, 60),
    temperature=st.sampled_from([1.0, 0.6]),
    bias=st.booleans(),
    transform=st.sampled_from(list(TRANSFORMS.values())),
    truncated=st.booleans(),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_tiles_of_any_size_give_the_same_numbers(
    dtype: torch.dtype,
    tokens: int,
    vocabulary: int,
    rows: int,
    logits: int,
    temperature: float,
    bias: bool,
    transform: LogitTransform,
    truncated: bool,
    entropy_gradient: bool,
    seed: int,
) -> None:
    parts, targets_T = inputs(tokens, vocabulary, bias=bias, dtype=dtype, seed=seed)
    options: dict[str, Any] = {"transform": transform, "entropy_gradient": entropy_gradient}
    if truncated:
        options["support"] = random_support(targets_T, vocabulary, seed)[0]
    with tiles(rows, logits):
        given = results(head_log_probs, parts, targets_T, temperature, **options)
    expected = results(plain, parts, targets_T, temperature, **options)
    eps = torch.finfo(dtype).eps
    for one, other in zip(given, expected, strict=True):
        # Logits are up to 20; gradients are sums over up to 23 entries of them.
        torch.testing.assert_close(one, other, rtol=20 * eps, atol=200 * eps)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_are_those_of_finite_differences(transform: LogitTransform) -> None:
    parts, targets_T = inputs(4, 7, bias=True, dtype=torch.float64)

    def function(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Any:
        return head_log_probs(
            hidden_TD, weight_VD, targets_T, 0.7, bias_V=bias_V, transform=transform, entropy=True
        )

    with tiles(3, 9):
        assert torch.autograd.gradcheck(function, parts)


def test_half_precision_is_summed_in_single_precision() -> None:
    """Against fp64: log-probs as far off as one rounding of a logit, gradients as far as one rounding of a product."""
    parts, targets_T = inputs(64, 500, bias=False, dtype=torch.bfloat16, size=16)
    exact = results(plain, [p.detach().double().requires_grad_() for p in parts], targets_T, 1.0)
    with tiles(16, 16 * 7):  # 288 tiles
        given = results(head_log_probs, parts, targets_T, 1.0)
    assert [x.dtype for x in given] == [torch.float32] * 2 + [torch.bfloat16] * 2
    eps = torch.finfo(torch.bfloat16).eps
    for one, other in zip(given, exact, strict=True):
        assert (one.double() - other).abs().max() <= 4 * eps * other.abs().max()


def test_an_entropy_that_is_only_reported_has_no_gradient() -> None:
    parts, targets_T = inputs(5, 9, bias=False, dtype=torch.float32)
    hidden_TD, weight_VD = parts
    log_probs_T, entropy_T = head_log_probs(
        hidden_TD, weight_VD, targets_T, 0.7, entropy=True, entropy_gradient=False
    )
    assert entropy_T is not None and not entropy_T.requires_grad and log_probs_T.requires_grad
    alone, none = head_log_probs(hidden_TD, weight_VD, targets_T, 0.7, entropy=False)
    assert none is None
    both = [torch.autograd.grad(x.sum(), parts) for x in (log_probs_T, alone)]
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_frozen_weights_and_no_tokens() -> None:
    (hidden_TD, weight_VD), targets_T = inputs(5, 9, bias=False, dtype=torch.float32)
    log_probs_T, _ = head_log_probs(hidden_TD, weight_VD.detach(), targets_T, 1.0, entropy=False)
    (gradient,) = torch.autograd.grad(log_probs_T.sum(), [hidden_TD])
    assert gradient.any()
    log_probs_T, entropy_T = head_log_probs(hidden_TD[:0], weight_VD, targets_T[:0], 1.0, entropy=True)
    assert log_probs_T.shape == (0,) and entropy_T is not None and entropy_T.shape == (0,)
    (gradient,) = torch.autograd.grad(log_probs_T.sum(), [weight_VD])
    assert not gradient.any()


def peak(function: Callable[..., Any], tokens: int, vocabulary: int, size: int, **more: Any) -> int:
    """The most bytes that a forward and a backward pass hold, without the gradient of the weight; no memory is used for it."""
    dtype = torch.bfloat16
    hidden_TD = torch.empty(tokens, size, device="meta", dtype=dtype, requires_grad=True)
    weight_VD = torch.empty(vocabulary, size, device="meta", dtype=dtype, requires_grad=True)
    targets_T = torch.empty(tokens, device="meta", dtype=torch.long)
    gc.collect()
    with Storages(hidden_TD, weight_VD, targets_T) as storages:
        log_probs_T, _ = function(hidden_TD, weight_VD, targets_T, 0.7, **more)
        log_probs_T.backward(torch.empty_like(log_probs_T))
    return storages.most - storages.first - vocabulary * size * dtype.itemsize


SIZES = {
    "7B": (
        13_107,
        ModelFacts("qwen2", 152_064, 3_584, 18_944, layers=28, heads=28, kv_heads=4, head_dim=128),
    ),
    "small": (5_000, ModelFacts("qwen2", 32_000, 512, 1_024, layers=8, heads=8, kv_heads=4, head_dim=64)),
    "few tokens": (
        300,
        ModelFacts("llama", 32_000, 2_048, 8_192, layers=8, heads=16, kv_heads=4, head_dim=128),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_memory_is_what_plan_counts(name: str) -> None:
    tokens, facts = SIZES[name]
    work = Work(tokens, tokens)
    counted = head_memory(facts, Layout(1, sharded=True), "last", work, trained=True)
    hidden = tokens * facts.hidden_size * 2  # the states at the predicting positions, which `peak` is given
    measured = peak(head_log_probs, tokens, facts.vocabulary, facts.hidden_size, entropy=True)
    assert measured + hidden == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_memory_is_a_hundredth_of_that_of_all_logits(entropy_gradient: bool) -> None:
    options = {"entropy": True, "entropy_gradient": entropy_gradient}
    whole, tiled = (peak(f, 32_768, 152_064, 3_584, **options) for f in (plain, head_log_probs))
    assert whole > 32_768 * 152_064 * 10
    assert tiled * 100 < whole
