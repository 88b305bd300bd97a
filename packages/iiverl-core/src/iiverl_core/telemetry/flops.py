"""How much of a device's arithmetic a training step uses: model FLOPs utilisation (MFU)."""

import re
from collections.abc import Iterable

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
"""Dense bf16 FLOP/s of a device, from its maker's data sheet, under words of its name; the first match counts."""


def training_flops(parameters: int, layers: int, heads: int, head_dim: int, lengths: Iterable[int]) -> int:
    """Count the FLOPs of one forward and backward pass of a transformer over sequences of these `lengths`.

    6·parameters·tokens + 6·layers·heads·head_dim·Σ length²: the matrices, and attention that is causal and so half of
    a full square (the counting of PaLM, arXiv:2204.02311, appendix B, with that half). `parameters` are those that
    multiply: every matrix, the embedding and the output layer included and norms left out, which for Llama 2 7B is
    6 738 149 376 of 6 738 415 616. A model's full count is as good: it gives 0.004 % more. `heads` are query heads.
    """
    lengths = tuple(lengths)
    matrices = 6 * parameters * sum(lengths)
    attention = 6 * layers * heads * head_dim * sum(n * n for n in lengths)
    return matrices + attention


def peak_flops(device_name: str) -> float | None:
    """Give the dense bf16 FLOP/s of a device by the name that torch gives it, or None where it is not known.

    A slice of a device (MIG) has a share of its peak that the name does not tell, and so has None.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAKS if words.issuperset(name.split())), None)


def mfu(flops: float, seconds: float, device_name: str, devices: int) -> float | None:
    """Give the share of the peak of `devices` like devices that `flops` in `seconds` is; None if it is not known."""
    peak = peak_flops(device_name)
    return None if peak is None or seconds <= 0 else flops / (seconds * peak * devices)
