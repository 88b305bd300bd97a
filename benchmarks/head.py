"""Time of a policy's head in tiles, and of the same head with the logits of all tokens at once, alternating.

    python benchmarks/head.py [--tokens 4096] [--vocabulary 1024] [--hidden 256] [--device cpu] [--dtype float32]

A forward and a backward pass, with the entropy as in an actor's update; the fastest of each.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iiverl_core.training.head import head_log_probs
from iiverl_core.training.log_probs import token_log_probs

ROUNDS = 10


def at_once(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute log-probs by way of all logits."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    return token_log_probs(logits_TV, targets_T, 1.0, entropy=True, entropy_gradient=False)[0]


def in_tiles(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute log-probs as a policy does."""
    return head_log_probs(hidden_TD, weight_VD, targets_T, 1.0, entropy=True, entropy_gradient=False)[0]


def seconds(
    function: Callable[..., Tensor], hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor
) -> float:
    """Time a forward and a backward pass."""
    hidden_TD, weight_VD = (x.detach().requires_grad_() for x in (hidden_TD, weight_VD))
    start = time.perf_counter()
    function(hidden_TD, weight_VD, targets_T).sum().backward()
    if hidden_TD.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Parse the arguments, and print both times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    options = {"device": given.device, "dtype": getattr(torch, given.dtype)}
    hidden_TD = torch.randn(given.tokens, given.hidden, **options)
    weight_VD = torch.randn(given.vocabulary, given.hidden, **options) * given.hidden**-0.5
    targets_T = torch.randint(given.vocabulary, (given.tokens,), device=given.device)
    ways = {"all logits at once": at_once, "in tiles": in_tiles}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, function in ways.items():
            times[name].append(seconds(function, hidden_TD, weight_VD, targets_T))
    for name, measured in times.items():
        print(f"{name:20s}{1000 * min(measured):10.1f} ms")


if __name__ == "__main__":
    main()
