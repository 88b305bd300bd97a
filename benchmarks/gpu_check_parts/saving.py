"""How much longer a step takes in which a checkpoint is copied and written in the background."""

import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gpu_check_parts.setting import GIB, NotPossibleError, Numbers, Setting, one_process
from gpu_check_parts.training import cut, make_backend, step
from iiverl_core.registry import BACKENDS
from iiverl_core.training import TrainingBackend

PAIRS = 4
BYTES = 12  # of a parameter in a checkpoint: the weight and AdamW's moments, in fp32


def save(setting: Setting, *, backend: str = "fsdp") -> Numbers:
    """Measure steps with and without a save in turn, and load the last one: its weights must be those before its step.

    A step with a save copies the state, and trains while that is copied and written; a further save begins when the files
    of the last one are complete. The first save is not counted: it allocates memory.

    Raises:
        ValueError: the checkpoint has other weights than there were when it was saved.
    """
    if missing := BACKENDS[backend].missing():
        raise NotPossibleError(missing)
    run = setting.configure(backend=backend)
    plain, saving, copying, writing = [], [], [], []
    size, first, before = 0, 0.0, 0.0
    with one_process(setting.device), TemporaryDirectory() as folder:
        actor = make_backend(run, "actor", setting.device)
        batches = cut(setting, setting.sequences(), packed=True)
        target = Path(folder) / "checkpoint"
        free, needed = shutil.disk_usage(folder).free, BYTES * actor.parameter_count()
        if free < needed:
            raise NotPossibleError(
                f"a checkpoint has {needed / GIB:.0f} GiB, and {folder} {free / GIB:.0f} left"
            )
        step(run, actor, batches)
        for pair in range(PAIRS + 1):
            plain.append(setting.seconds(lambda: step(run, actor, batches), warm_up=False, times=1))
            shutil.rmtree(target, ignore_errors=True)
            before = _digest(actor)
            setting.synchronize()
            started = time.perf_counter()
            wait = actor.save(target)
            copied = time.perf_counter()
            step(run, actor, batches)
            setting.synchronize()
            stepped = time.perf_counter()
            wait()
            written = time.perf_counter()
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            if pair == 0:
                plain, first = [], copied - started
                continue
            saving.append(stepped - started)
            copying.append(copied - started)
            writing.append(written - started)
        after = _digest(actor)
        actor.load(target)
        if not _digest(actor) == before != after:
            raise ValueError("the checkpoint does not have the weights of the moment at which it was saved")
    return {
        "step s": statistics.median(plain),
        "step with save s": statistics.median(saving),
        "ratio": statistics.median(a / b for a, b in zip(saving, plain, strict=True)),
        "waited s": statistics.median(copying),
        "waited at first s": first,
        "written after s": statistics.median(writing),
        "saved GiB": size / GIB,
    }


def _digest(actor: TrainingBackend) -> float:
    """Compute a number that depends on all weights."""
    with torch.no_grad():
        sums = [weight.view(torch.uint8).sum(dtype=torch.int64) for _, weight in actor.named_weights()]
    return float(torch.stack(sums).double().cos().sum().item())
