"""Seconds that generating and training take, per token, weight and sequence."""

from dataclasses import dataclass, replace

from iiverl_core.telemetry.flops import by_device_name, peak_flops

BF16 = 2
MFU, BANDWIDTH_SHARE = 0.4, 0.6
"""Shares of a device's peak FLOP/s and of its memory's bandwidth that are assumed where nothing was measured."""
UPDATE, FORWARD = 6, 2
"""FLOPs per parameter and token of an update, and of a pass without gradients."""

BANDWIDTHS: tuple[tuple[str, float], ...] = (
    ("GB200", 8.0e12),
    ("B200", 8.0e12),
    ("H100 PCIE", 2.0e12),
    ("H100", 3.35e12),
    ("H200", 4.8e12),
    ("GH200", 4.0e12),
    ("H800 PCIE", 2.0e12),
    ("H800", 3.35e12),
    ("H20", 4.0e12),
    ("A100", 2.0e12),
    ("A800", 2.0e12),
    ("L40S", 0.864e12),
    ("L4", 0.3e12),
    ("A10", 0.6e12),
    ("MI300X", 5.3e12),
    ("MI325X", 6.0e12),
)
"""Bytes per second of a device's memory by words of its name, from data sheets; the first match counts."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, those that a token passes (`active`), and the bytes of one token's keys and values."""

    parameters: float
    active: float
    cache_bytes: float


@dataclass(frozen=True)
class Costs:
    """Seconds that one engine and one device that trains take.

    A decoding step of an engine reads its weights (`read`) and its cache (`cached` per token in it), or computes
    (`computed` per token), whichever takes longer. Training takes `trained` per token, and the transfer of weights
    `transfer` per step.
    """

    read: float
    cached: float
    computed: float
    trained: float
    transfer: float = 0.0

    def decode(self, sequences: int, context: float) -> float:
        """Return the time of one step of an engine, for sequences of `context` tokens in all."""
        return max(self.read + self.cached * context, self.computed * sequences)

    def with_engines_slower(self, factor: float) -> "Costs":
        """Return the costs if engines take `factor` times as long for everything."""
        return replace(
            self, read=self.read * factor, cached=self.cached * factor, computed=self.computed * factor
        )


def estimate_costs(
    size: ModelSize,
    device: str,
    *,
    mfu: float = MFU,
    bandwidth_share: float = BANDWIDTH_SHARE,
    engine_devices: int = 1,
    flops_per_weight: float = UPDATE,
) -> Costs | None:
    """Estimate costs from the data sheet of a device, given by its name; None if it is not known.

    Reading is bound by the memory's bandwidth and computing by arithmetic, each at a share of the peak. Training takes
    `flops_per_weight` per active parameter and token. Weights and caches are in bf16; their transfer is left out.
    """
    flops, bandwidth = peak_flops(device), by_device_name(BANDWIDTHS, device)
    if flops is None or bandwidth is None:
        return None
    reading, computing = bandwidth * bandwidth_share * engine_devices, flops * mfu
    return Costs(
        read=BF16 * size.parameters / reading,
        cached=size.cache_bytes / reading,
        computed=FORWARD * size.active / (computing * engine_devices),
        trained=flops_per_weight * size.active / computing,
    )
