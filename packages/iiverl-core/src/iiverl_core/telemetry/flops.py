"""Model FLOPs utilization (MFU) of a training step."""

import re
from collections.abc import Iterable

from iiverl_core.training.planning import Work

PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GB200", 2500e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800 PCIE", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("MI300X", 1307e12),
    ("MI325X", 1307e12),
)
"""Dense bf16 FLOP/s by words of the device name, from data sheets; the first match counts."""


def training_flops(parameters: int, layers: int, heads: int, head_dim: int, work: Iterable[Work]) -> int:
    """Count the FLOPs of a forward and backward pass of a transformer over this `work`.

    6·parameters·tokens + 6·layers·heads·head_dim·squares: the matrices, and causal attention as half of the full
    square (PaLM, arXiv:2204.02311, appendix B, with that half). `parameters` counts the weights of all matrices,
    including the embedding and the output layer but no norms: 6 738 149 376 of 6 738 415 616 for Llama 2 7B. The
    model's full count gives 0.004 % more. `heads` are query heads. A shared prompt counts once, as it is computed.
    """
    total = sum(work, Work())
    return 6 * parameters * total.tokens + 6 * layers * heads * head_dim * total.squares


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its name in torch, or None if unknown.

    A MIG slice's name does not give its fraction of the peak, so it is unknown.
    """
    return by_device_name(PEAKS, device_name)


def by_device_name(table: Iterable[tuple[str, float]], device_name: str) -> float | None:
    """Return the value of the first entry of a table all of whose words are in a device's name; None if there is none."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((value for name, value in table if words.issuperset(name.split())), None)


def mfu(flops: float, seconds: float, device_name: str, devices: int) -> float | None:
    """Return `flops` in `seconds` as a fraction of the peak of `devices` devices; None if the peak is unknown."""
    peak = peak_flops(device_name)
    return None if peak is None or seconds <= 0 else flops / (seconds * peak * devices)
