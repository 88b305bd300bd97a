"""Over how many devices a model's matrices can be split, and which numbers near one that does not work would."""

from collections.abc import Callable


def splits(size: int, *, heads: int, kv_heads: int, inner: int) -> bool:
    """Whether `size` devices get the same part of each layer.

    Heads and the MLP's `inner` size divide by it; heads of keys and values divide too, or else each is on several.
    """
    return not (heads % size or inner % size or (kv_heads % size and size % kv_heads))


def engine_problem(size: int, devices: int, *, heads: int, kv_heads: int, inner: int) -> str | None:
    """Say that a model cannot be spread over a rollout engine's devices, and over how many of the run's it can be."""

    def works(size: int) -> bool:
        return splits(size, heads=heads, kv_heads=kv_heads, inner=inner)

    if works(size):
        return None
    best = max(n for n in range(1, size) if devices % n == 0 and works(n))
    return (
        f"does not divide over {size} devices: it has {heads} attention heads, {kv_heads} of keys and values, and layers "
        f"of {inner}. Set it to {best}"
    )


def nearest_sizes(size: int, most: int, works: Callable[[int], bool]) -> str:
    """Name the sizes that work, the nearest below `size` and the nearest above up to `most`: `2 or 8`."""
    below = next((n for n in range(min(size - 1, most), 0, -1) if works(n)), None)
    above = next((n for n in range(size + 1, most + 1) if works(n)), None)
    found = [str(n) for n in (below, above) if n]
    return " or ".join(found)
