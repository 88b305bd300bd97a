"""Time of a weight sync to an engine apart, with buckets one after the other and with two in flight, alternating.

    python benchmarks/weight_sync.py [--buckets 12] [--gather 0.05] [--load 0.05] [--rounds 5]

Gathering a bucket and loading it take made-up times; what carries the buckets is the sender and the receiver of a run,
with the store of one process between them. One after the other, the next bucket is asked for when the engine has
loaded the last one.
"""

import argparse
import threading
import time
from collections.abc import Iterable, Iterator
from statistics import median

import torch
from torch import Tensor

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.store import LocalStore
from iiverl_core.cluster.weight_sync import WeightReceiver, WeightSender
from iiverl_core.cluster.weight_transport import StoreTransport

CPU = torch.device("cpu")
BUCKET_BYTES = 2**22


def sync(options: argparse.Namespace, *, in_turn: bool) -> float:
    """Carry all buckets, each of one weight, to an engine; return the seconds."""
    loaded = threading.Semaphore(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i in range(options.buckets):
            time.sleep(options.gather)
            yield f"w{i}", torch.full((BUCKET_BYTES // 4,), float(i))

    def update(received: Iterable[tuple[str, Tensor]], sync: WeightSync) -> ReceivedWeights:
        for i, (name, value) in enumerate(received):
            time.sleep(options.load)
            assert name == f"w{i}" and value[0] == i == value[-1]
            loaded.release()
        return ReceivedWeights(sync, 0, {})

    transport, store = StoreTransport(), LocalStore()
    sender = WeightSender(store, CPU, sends=True)
    receiver = WeightReceiver(0, store, CPU, update)
    began = time.perf_counter()
    sender.begin(weights(), transport)
    receiver.begin(WeightSync(1), transport)
    while (bucket := sender.next_bucket(BUCKET_BYTES)) is not None:
        receiver.load(bucket)
        if in_turn:
            loaded.acquire()
    receiver.finish()
    return time.perf_counter() - began


def main() -> None:
    """Alternate, and print the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--buckets", type=int, default=12)
    parser.add_argument("--gather", type=float, default=0.05, help="seconds to gather a bucket")
    parser.add_argument("--load", type=float, default=0.05, help="seconds to load a bucket")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(options.rounds):
        for in_turn, seconds in took.items():
            seconds.append(sync(options, in_turn=in_turn))
    one, two = (median(took[in_turn]) for in_turn in (True, False))
    ratio = median(b / a for a, b in zip(took[True], took[False], strict=True))
    print(f"one bucket at a time {one:.3f} s, two in flight {two:.3f} s: ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
