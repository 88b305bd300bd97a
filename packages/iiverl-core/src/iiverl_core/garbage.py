"""The garbage collector, which visits all objects of a process again and again, most of which live until its end."""

import gc
import sys
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

    Importing torch and transformers takes a sixth longer without. If nothing is imported, as by a second run of a
    process, nothing is kept either: it might be what the first run left behind.
    """
    before, modules = gc.get_threshold(), len(sys.modules)
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        gc.set_threshold(*before)


def collect_rarely() -> None:
    """Visit the objects of a process that only decides less often.

    A step makes hundreds of thousands of objects that live until its end, and no cycles; visiting them again and again
    took a third of the controller's time (`benchmarks/controller_scale.py`).
    """
    gc.freeze()
    gc.set_threshold(*RARELY)
