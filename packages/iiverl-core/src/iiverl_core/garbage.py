"""The garbage collector, which visits all objects of a process again and again, most of which live until its end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = (
    100_000,
    20,
    50,
)  # allocations before a collection of the youngest, and how many of those before an older one


@contextmanager
def importing() -> Iterator[None]:
    """Collect rarely while modules are imported, which makes a million objects and no garbage, and never visit those again.

    Importing torch and transformers takes a sixth longer without.
    """
    before = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


def collect_rarely() -> None:
    """Visit the objects of a process that only decides less often.

    A step makes hundreds of thousands of objects that live until its end, and no cycles; visiting them again and again
    took a third of the controller's time (`benchmarks/controller_scale.py`).
    """
    gc.freeze()
    gc.set_threshold(*RARELY)
