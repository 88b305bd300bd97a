"""Weight sync: no weight is lost, doubled or held for long."""

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.store import LocalStore, Store, open_all
from iiverl_core.cluster.weight_sync import StreamedUpdate, WeightReceiver, WeightSender
from iiverl_core.cluster.weight_transport import (
    BucketReceiver,
    SerializedTensor,
    StoreTransport,
    WeightTransport,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
CPU = torch.device("cpu")
STORE = LocalStore()


class Recorder:
    """A transport, and the end of it that sends; it keeps the order of the calls."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def open_sender(self, store: Store, device: torch.device) -> "Recorder":
        return self

    def open_receiver(self, index: int, store: Store, device: torch.device) -> BucketReceiver:
        raise NotImplementedError

    def flush(self) -> None:
        self.log.append("flush")

    def pack(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        return name, value.clone()

    def send(self, bucket: Sequence[Any]) -> Any:
        self.log.append("send")
        return list(bucket)

    def close(self) -> None: ...


def sender_of(
    weights: Iterable[tuple[str, Tensor]], transport: WeightTransport, *, sends: bool = True
) -> WeightSender:
    sender = WeightSender(STORE, CPU, sends=sends)
    sender.begin(weights, transport)
    return sender


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES)), max_size=12),
    st.integers(1, 200),
)
def test_weights_that_are_sent_arrive(sizes: list[tuple[int, torch.dtype]], bucket_bytes: int) -> None:
    weights = {f"w{i}": (torch.arange(n) - i).to(dtype).reshape(1, n) for i, (n, dtype) in enumerate(sizes)}
    got: dict[str, torch.Tensor] = {}

    def update(received: Iterable[tuple[str, Tensor]], sync: WeightSync) -> ReceivedWeights:
        assert sync.version == 7
        for name, value in received:
            assert name not in got
            got[name] = value
        return ReceivedWeights(sync, len(got), {})

    sender = sender_of(weights.items(), StoreTransport())
    receiver = WeightReceiver(0, STORE, CPU, update)
    receiver.begin(WeightSync(7), StoreTransport())
    while (bucket := sender.next_bucket(bucket_bytes)) is not None:
        values = [each.tensor() for each in open_all(STORE, [bucket])[0]]
        assert sum(value.nbytes for value in values[:-1]) < bucket_bytes
        assert receiver.load(bucket) is None
    assert receiver.finish().nbytes == len(weights)
    assert list(got) == list(weights)
    for name, value in weights.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value)


def test_workers_that_do_not_send_gather_the_same_buckets() -> None:
    gathered: list[list[int]] = [[], []]

    def weights(worker: int):
        for i in range(9):
            gathered[worker].append(i)
            yield f"w{i}", torch.zeros(i + 1)

    sending = sender_of(weights(0), Recorder())
    other = sender_of(weights(1), Recorder(), sends=False)
    while sending.next_bucket(40) is not None:
        assert other.next_bucket(40) is None
        assert gathered[0] == gathered[1]
    assert len(gathered[0]) == 9


def test_a_bucket_is_sent_before_the_next_is_gathered() -> None:
    transport = Recorder()
    sender = sender_of([("a", torch.zeros(4)), ("b", torch.zeros(4))], transport)
    while sender.next_bucket(1) is not None:
        pass
    assert transport.log == ["send", "flush", "send", "flush"]


def test_a_bucket_arrives_while_the_one_before_is_loaded_and_no_third_is_there() -> None:
    loading, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def update(weights) -> None:
        for _ in weights:
            loading.release()
            assert go_on.acquire(timeout=30)

    running = StreamedUpdate(update)
    buckets = [[torch.zeros(2)] for _ in range(4)]
    held = [weakref.ref(bucket[0]) for bucket in buckets]

    def alive() -> list[int]:
        return [i for i, each in enumerate(held) if each() is not None and not buckets[i]]

    def feed(i: int) -> None:
        running.feed(zip(["w"], [buckets[i].pop()], strict=True))

    feed(0)
    assert loading.acquire(timeout=30)
    for i in range(1, 4):
        second = threading.Thread(target=feed, args=(i,))  # it came while the one before is being loaded
        second.start()
        second.join(0.05)
        assert second.is_alive() and alive() == [i - 1, i]
        go_on.release()
        second.join(30)
        assert loading.acquire(timeout=30)
    assert alive() == [3]
    go_on.release()
    running.finish()
    assert alive() == []


def test_gathering_overlaps_with_loading() -> None:
    """The sender is asked for a second bucket, and the receiver takes it, before the first is loaded."""
    loaded, go_on = [], threading.Event()

    def update(received: Iterable[tuple[str, Tensor]], sync: WeightSync) -> ReceivedWeights:
        for name, _ in received:
            assert go_on.wait(30)
            loaded.append(name)
        return ReceivedWeights(sync, 0, {})

    sender = sender_of([(f"w{i}", torch.zeros(4)) for i in range(3)], StoreTransport())
    receiver = WeightReceiver(0, STORE, CPU, update)
    receiver.begin(WeightSync(1), StoreTransport())
    assert receiver.load(sender.next_bucket(1)) is None
    second = sender.next_bucket(1)
    assert second is not None and loaded == []
    go_on.set()
    assert receiver.load(second) is None
    assert receiver.load(sender.next_bucket(1)) is None
    receiver.finish()
    assert loaded == ["w0", "w1", "w2"]


def test_an_update_that_is_aborted_fails_and_leaves_no_thread() -> None:
    ends: list[str] = []

    def update(weights) -> None:
        try:
            for _ in weights:
                pass
        except Exception as error:
            ends.append(type(error).__name__)
            raise

    for fed in range(2):
        running = StreamedUpdate(update)
        for _ in range(fed):
            running.feed([("w", torch.zeros(2))])
        running.abort()
    assert ends == ["SyncAbortedError"] * 2
    assert not any(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate())


def test_read_only_arrays_of_a_store_are_read() -> None:
    serialized = SerializedTensor.of("w", torch.tensor([1.0, -2.0]))
    serialized.data.flags.writeable = False
    assert serialized.tensor().tolist() == [1.0, -2.0]


def test_an_update_that_fails_raises_and_blocks_nobody() -> None:
    def update(weights) -> None:
        next(weights)
        raise ValueError("no such weight")

    running = StreamedUpdate(update)
    bucket = [("w", torch.zeros(2))]
    with pytest.raises(ValueError, match="no such weight"):
        for _ in range(3):
            running.feed(bucket)
        running.finish()
    assert not any(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate())
