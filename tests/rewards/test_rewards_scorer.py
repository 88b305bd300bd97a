"""The scorer on its thread: order, overlap with the caller, and every way for a call to go wrong."""

import asyncio
import signal
import threading
import time

import pytest

from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.rewards import FunctionScorer, Scorer
from iiverl_core.rewards.custom import load_custom_function
from iiverl_reward_client import Failed, Scored
from rollouts import id_of

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def scorer_of():
    """Makes a scorer of a function, and closes it after the test."""
    scorers: list[Scorer] = []

    def make(function) -> Scorer:
        scorers.append(FunctionScorer(function))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def by_length(sample):
    return Scored(float(len(sample.text)))


def test_every_sample_has_its_own_outcome(scorer_of, make_sample):
    scorer = scorer_of(by_length)
    keys = [(group, member) for group in range(20) for member in range(3)]
    for group, member in keys:
        scorer.submit(make_sample("x" * (group * 3 + member), key=(group, member)))
    assert scorer.collect([id_of(g, m) for g, m in keys]) == {
        id_of(g, m): Scored(float(g * 3 + m)) for g, m in keys
    }


def test_each_collect_gives_what_it_asks_for_once(scorer_of, make_sample):
    scorer = scorer_of(by_length)
    assert scorer.collect([]) == {}
    for group in range(3):
        scorer.submit(make_sample("a" * group, key=(group, 0)))
    assert scorer.collect([id_of(2, 0), id_of(0, 0)]) == {id_of(2, 0): Scored(2.0), id_of(0, 0): Scored(0.0)}
    assert scorer.collect([id_of(1, 0)]) == {id_of(1, 0): Scored(1.0)}
    with pytest.raises(KeyError):
        scorer.collect([id_of(1, 0)])
    scorer.submit(make_sample("bb", key=(1, 0)))
    assert scorer.collect([id_of(1, 0)]) == {id_of(1, 0): Scored(2.0)}


def test_some_are_collected_while_others_are_being_scored(scorer_of, make_sample):
    may_end = threading.Event()

    def function(sample):
        if sample.id.group:
            may_end.wait(10)
        return Scored(float(sample.id.group))

    scorer = scorer_of(function)
    for group in range(2):
        scorer.submit(make_sample(key=(group, 0)))
    assert scorer.collect([id_of(0, 0)]) == {id_of(0, 0): Scored(0.0)}
    may_end.set()
    assert scorer.collect([id_of(1, 0)]) == {id_of(1, 0): Scored(1.0)}


def test_calls_come_one_at_a_time_from_one_other_thread_in_order(scorer_of, make_sample):
    calls, threads, running = [], set(), []

    def function(sample):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.001)
        running.pop()
        calls.append(sample.id.group)
        threads.add(threading.get_ident())
        return Scored(0.0)

    scorer = scorer_of(function)
    order = [5, 3, 9, 0, 7, 1, 8, 2, 6, 4]
    for group in order:
        scorer.submit(make_sample(key=(group, 0)))
    scorer.collect([id_of(group, 0) for group in order])
    assert calls == order
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_scoring_goes_on_while_the_caller_generates(scorer_of, make_sample):
    scored = threading.Event()
    may_end = threading.Event()

    def function(sample):
        if sample.id.group == 0:
            scored.set()
        else:
            may_end.wait(10)
        return Scored(0.0)

    scorer = scorer_of(function)
    scorer.submit(make_sample(key=(0, 0)))
    assert scored.wait(10)  # before any collect
    scorer.submit(make_sample(key=(1, 0)))
    scorer.submit(make_sample(key=(2, 0)))  # at once, although a call is running
    may_end.set()
    assert len(scorer.collect([id_of(group, 0) for group in range(3)])) == 3


def test_collect_waits_without_using_the_processor(scorer_of, make_sample):
    scorer = scorer_of(lambda sample: time.sleep(0.5) or Scored(0.0))
    scorer.submit(make_sample())
    used = time.process_time()
    scorer.collect([id_of()])
    assert time.process_time() - used < 0.2


def test_a_sample_that_comes_twice_is_refused(scorer_of, make_sample):
    scorer = scorer_of(by_length)
    scorer.submit(make_sample(key=(3, 1)))
    with pytest.raises(ValueError, match="group 3, member 1 was submitted twice"):
        scorer.submit(make_sample(key=(3, 1)))


def test_an_exception_of_the_program_surfaces_in_collect(scorer_of, make_sample):
    def function(sample):
        if sample.id.group == 1:
            raise KeyError("a fault of the program")
        return Scored(0.0)

    scorer = scorer_of(function)
    for group in range(3):
        scorer.submit(make_sample(key=(group, 0)))
    for _ in range(2):  # it stays, since no later outcome can come
        with pytest.raises(KeyError, match="a fault of the program"):
            scorer.collect([id_of(group, 0) for group in range(3)])


def test_a_failure_of_one_sample_leaves_the_others(scorer_of, make_sample):
    scorer = scorer_of(lambda s: Failed("function", detail="no") if s.id.group == 1 else Scored(1.0))
    for group in range(3):
        scorer.submit(make_sample(key=(group, 0)))
    assert scorer.collect([id_of(group, 0) for group in range(3)]) == {
        id_of(0, 0): Scored(1.0),
        id_of(1, 0): Failed("function", detail="no"),
        id_of(2, 0): Scored(1.0),
    }


def test_what_is_awaited_shares_one_event_loop(scorer_of, make_sample):
    loops = []

    async def function(sample):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.001)
        return Scored(float(sample.id.group))

    scorer = scorer_of(function)
    for group in range(3):
        scorer.submit(make_sample(key=(group, 0)))
    expected = {id_of(group, 0): Scored(float(group)) for group in range(3)}
    assert scorer.collect(list(expected)) == expected
    assert len(loops) == 3
    assert all(loop is loops[0] for loop in loops)


def test_close_drops_what_waits_and_ends_the_thread(make_sample):
    calls = []
    started, may_end = threading.Event(), threading.Event()

    def function(sample):
        calls.append(sample.id.group)
        started.set()
        may_end.wait(10)
        return Scored(0.0)

    before = set(threading.enumerate())
    scorer = FunctionScorer(function)
    for group in range(5):
        scorer.submit(make_sample(key=(group, 0)))
    assert started.wait(10)
    (thread,) = set(threading.enumerate()) - before
    threading.Timer(0.05, may_end.set).start()
    scorer.close()
    assert not thread.is_alive()
    assert calls == [0]
    scorer.close()  # twice does no harm
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(make_sample())
    with pytest.raises(RuntimeError, match="closed"):
        scorer.collect([id_of(0, 0)])


def test_close_does_not_wait_for_a_call_that_never_ends(make_sample):
    may_end = threading.Event()
    scorer = FunctionScorer(lambda sample: Scored(float(may_end.wait(15))))
    scorer.submit(make_sample())
    began = time.monotonic()
    scorer.close()
    assert time.monotonic() - began < 5
    may_end.set()


def test_close_wakes_a_collect_that_waits_in_another_thread(make_sample):
    may_end = threading.Event()
    scorer = FunctionScorer(lambda sample: Scored(float(may_end.wait(10))))
    scorer.submit(make_sample())
    threading.Timer(0.1, scorer.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.collect([id_of()])
    may_end.set()


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_gets_through_while_collect_waits(scorer_of, make_sample):
    may_end = threading.Event()
    scorer = scorer_of(lambda sample: Scored(float(may_end.wait(15))))
    scorer.submit(make_sample())
    threading.Timer(0.2, _send_interrupt).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scorer.collect([id_of()])
    assert time.monotonic() - began < 5
    may_end.set()
    assert scorer.collect([id_of()]) == {id_of(0, 0): Scored(1.0)}  # and nothing was lost


def _send_interrupt() -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


SWALLOWS_A_SIGNAL_TIMEOUT = """
import signal

def verify(a, b):
    # The way of libraries that make their timeouts of signals and answer "not equal" to every exception.
    try:
        signal.signal(signal.SIGALRM, lambda *_: None)
        return a == b
    except Exception:
        return False

{prefix}def compute_score(data_source, solution_str, ground_truth, extra_info):
    return float(verify(solution_str, ground_truth))
"""


@pytest.mark.parametrize("prefix", ["", "async "])
def test_a_timeout_made_of_signals_is_a_failure_and_not_a_zero(scorer_of, make_sample, tmp_path, prefix):
    file = tmp_path / "signal_reward.py"
    file.write_text(SWALLOWS_A_SIGNAL_TIMEOUT.format(prefix=prefix))
    handler = signal.signal
    scorer = scorer_of(load_custom_function(CustomRewardFunctionConfig(path=str(file))))
    scorer.submit(make_sample("42", "42"))
    outcome = scorer.collect([id_of()])[id_of()]
    assert isinstance(outcome, Failed)
    assert "signal.signal" in outcome.detail
    assert "timeout_seconds=None" in outcome.detail
    assert signal.signal is handler
