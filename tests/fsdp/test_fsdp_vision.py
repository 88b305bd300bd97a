"""Vision-language models: trainer, engine and transformers agree, and gradients depend on the data alone."""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoProcessor

from iiverl_core.config import FSDPConfig, ModelConfig, OptimConfig
from iiverl_core.data import ImageProcessor
from iiverl_core.data.images import decode
from iiverl_core.rollout import GenerationRequest, SamplingParams
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.samples import Prompt, SampleId, TokenSequence
from iiverl_core.training import LayoutKind, MicroBatch, ModelSpec, Outputs
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks
from vision_models import FAMILIES, SIDE, png, save_vision_model

CPU = torch.device("cpu")
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
FP64 = {"param_dtype": "fp64", "reduce_dtype": "fp64"}  # tells rounding from faults
RED, BLUE, GREEN = png("red"), png((0, 0, 255), (3 * SIDE, 2 * SIDE)), png("green", (4 * SIDE, SIDE))
SIGHTS = {
    "u:say a word;a:": (),
    "u:<|vision_start|><|image_pad|><|vision_end|>what?;a:": (RED,),
    "u:a<|vision_start|><|image_pad|><|vision_end|> or <|vision_start|><|image_pad|><|vision_end|>?;a:": (
        BLUE,
        GREEN,
    ),
    "u:last <|vision_start|><|image_pad|><|vision_end|>;a:": (GREEN,),
}
"""Texts and their images: none, one, two of different sizes."""


def prompts(path: Path) -> tuple[ImageProcessor, list[Prompt]]:
    processor = ImageProcessor(AutoProcessor.from_pretrained(path))
    found = []
    for row, (text, images) in enumerate(SIGHTS.items()):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = processor.expand(ids, [processor.count_tokens(each) for each in images])
        found.append(Prompt(row, tuple(ids), text, images=images))
    return processor, found


def sequences(path: Path, n: int = 2) -> list[TokenSequence]:
    """`n` sequences per prompt, of uneven lengths; some have image tokens that the policy sampled."""
    processor, all_prompts = prompts(path)
    rng = np.random.default_rng(0)
    made = []
    for prompt in all_prompts:
        images = processor.prepare(prompt)
        for _ in range(n):
            response = rng.integers(0, 256, rng.integers(2, 7))
            response[rng.random(len(response)) < 0.3] = processor.token_id
            zeros = np.zeros(len(response), dtype=np.float32)
            made.append(TokenSequence.single_turn(prompt.ids, response, zeros, images=images))
    return made


def spec(path: Path, *, packed: bool | None = None, frozen: bool = False, exact: bool = False) -> ModelSpec:
    """The actor at `path`; `exact` computes in fp64, which no configuration offers."""
    parallel = FSDPConfig(mixed_precision=FP32)
    if exact:
        precision = parallel.mixed_precision.model_copy(update=FP64)
        parallel = parallel.model_copy(update={"mixed_precision": precision, "model_dtype": "fp64"})
    return ModelSpec(
        role="actor",
        model=ModelConfig(
            path=str(path), use_remove_padding=packed, enable_gradient_checkpointing=packed is None
        ),
        parallel=parallel,
        device=CPU,
        optim=OptimConfig(lr=1e-2),
        freeze_vision_tower=frozen,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.set_num_threads(1)
            save_vision_model(made[family], family)
        return made[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_engine_and_transformers_agree(family: str, saved, one_rank: None) -> None:
    path = saved(family)
    processor, all_prompts = prompts(path)
    engine = HFEngine(str(path), dtype=torch.float32, device="cpu")
    backend = FSDPBackend(spec(path))
    assert backend.layout == "shared"
    engine.update_weights(backend.named_weights(), 1)
    made = answers(engine, path, 10)
    assert len(made) == 3 * len(all_prompts)
    groups = [i // 3 for i in range(len(made))]
    engines = torch.from_numpy(np.concatenate([each.trained_log_probs for each in made]))
    (shared,) = backend.forward([make_micro_batch(made, {}, [0.0] * len(made), groups=groups, device=CPU)])
    torch.testing.assert_close(shared.log_probs_T, engines, atol=1e-5, rtol=0)
    # transformers takes an image token that was sampled for a part of an image that is missing.
    ends = [len(prompt.ids) for prompt in all_prompts]
    usual = [i for i, each in enumerate(made) if processor.token_id not in each.token_ids[ends[i // 3] :]]
    assert len(usual) > len(made) // 2
    reference = processor_log_probs(path, all_prompts, [made[i] for i in usual], [groups[i] for i in usual])
    kept = torch.from_numpy(np.concatenate([made[i].trained_log_probs for i in usual]))
    torch.testing.assert_close(kept, reference, atol=1e-5, rtol=0)


def answers(engine: Any, path: Path, max_tokens: int = 6) -> list[TokenSequence]:
    """Three sampled responses to each prompt, as sequences in the order of prompts and members."""
    processor, all_prompts = prompts(path)
    for prompt in all_prompts:
        inputs = processor.prepare(prompt)
        for member in range(3):
            request = GenerationRequest(
                SampleId("train", 1, prompt.row, member), prompt.ids, prompt.row, inputs
            )
            engine.submit(request, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    done = []
    while engine.pending:
        done += engine.step()
    done.sort(key=lambda each: each.request.id)
    return [
        TokenSequence.single_turn(
            each.request.prompt_ids, each.token_ids, each.log_probs, images=each.request.images
        )
        for each in done
    ]


WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Attention heads as narrow as vLLM on a CPU can do."""


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make setup-vllm)")
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_and_the_trainer_agree_also_after_a_step(family: str, tmp_path: Path) -> None:
    save_vision_model(tmp_path, family, **WIDE)
    process = Ranks(1, tmp_path)  # which vLLM takes out of its group when it ends
    try:
        ((before, after),) = process.run(vllm_and_trainer, tmp_path)
    finally:
        process.close()
    assert before < 1e-5 and after < 1e-5


def vllm_and_trainer(path: Path) -> tuple[float, float]:
    """The largest differences of log-probs between vLLM and the trainer, before and after a step that changes the tower."""
    from iiverl_core.rollout.vllm import VLLMEngine
    from iiverl_core.rollout.vllm.arguments import FIXED

    small = {"max_model_len": 64, "max_num_seqs": 16, "max_num_batched_tokens": 256}
    memory = {"kv_cache_memory_bytes": 2**25, "block_size": 32, "enforce_eager": True}
    arguments = {"model": str(path), "dtype": "float32", "load_format": "dummy", **small, **memory, **FIXED}
    backend = FSDPBackend(spec(path))
    engine = VLLMEngine({**arguments, "disable_log_stats": True}, bucket_bytes=2**14)
    differences = []
    for version in range(2):
        engine.update_weights(backend.named_weights(), version)
        made = answers(engine, path)
        batch = make_micro_batch(made, {}, [0.1] * len(made), groups=[i // 3 for i in range(12)], device=CPU)
        (outputs,) = backend.forward([batch])
        expected = np.concatenate([each.trained_log_probs for each in made])
        assert outputs.log_probs_T is not None
        differences.append(float(np.abs(outputs.log_probs_T.numpy() - expected).max()))
        backend.forward_backward([batch], loss)
        backend.step(1e-2)
    engine.close()
    return differences[0], differences[1]


@torch.no_grad()
def processor_log_probs(
    path: Path, all_prompts: list[Prompt], made: list[TokenSequence], rows: list[int]
) -> torch.Tensor:
    """Log-probs by transformers alone: its processor's inputs, and its model's forward pass over each sequence."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    found = []
    for sequence, row in zip(made, rows, strict=True):
        prompt = all_prompts[row]
        images = [decode(each) for each in prompt.images]
        inputs = processor(text=[prompt.text], images=images or None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == list(prompt.ids)
        response = torch.from_numpy(sequence.token_ids[len(prompt.ids) :])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], response[None]], 1)
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(response)[None]], 1)
        inputs.pop("attention_mask")
        logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1]
        found.append(logits.log_softmax(-1)[torch.arange(len(response)), response])
    return torch.cat(found)


def loss(outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    assert outputs.log_probs_T is not None
    return (outputs.log_probs_T * batch.weights_T).sum(), {}


def gradients(
    backend: FSDPBackend, layout: LayoutKind, made: list[TokenSequence], parts: list[list[int]]
) -> dict[str, torch.Tensor]:
    """Gradients of the sum of weighted log-probs of sequences in these micro-batches, of which empty ones are dummies."""
    if backend.layout != "padded":
        backend.layout = layout
    batches = [
        make_micro_batch(
            [made[i] for i in part],
            {},
            [np.sin(i + 1.0) for i in part],
            groups=[i // 2 for i in part],
            device=CPU,
        )
        if part
        else dummy_micro_batch((), CPU)
        for part in parts
    ]
    backend.forward_backward(batches, loss)
    return {name: gradient.clone() for name, gradient in backend.named_gradients()}


WHOLE: list[list[int]] = [list(range(8))]
DIVISIONS = {
    "shared, one micro-batch": ("shared", WHOLE),
    "shared, text alone": ("shared", [[0, 1], [2, 3, 4, 5, 6, 7]]),
    "shared, groups torn": ("shared", [[0, 3, 5], [2, 1, 7, 4, 6]]),
    "packed, one row": ("packed", WHOLE),
    "packed, in another order": ("packed", [[7, 2, 0], [6, 1, 5, 3, 4]]),
    "one at a time": ("packed", [[i] for i in range(8)]),
    "with dummies": ("packed", [[], [7, 6, 5, 4], [], [3, 2, 1, 0]]),
}


def all_divisions(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    made = sequences(path)
    backend = FSDPBackend(spec(path, exact=True))
    assert backend.layout == "shared"
    found = {name: gradients(backend, layout, made, parts) for name, (layout, parts) in DIVISIONS.items()}
    padded = FSDPBackend(spec(path, packed=False, exact=True))
    assert padded.layout == "padded"
    found["padded"] = gradients(padded, "padded", made, WHOLE)
    found["padded, a few at a time"] = gradients(padded, "padded", made, [[0], [1, 2, 3], [4, 5, 6, 7]])
    return found


def every_order(path: Path) -> list[dict[str, torch.Tensor]]:
    """Gradients on this rank of a text, an image and no work in every order, of both ranks: the same batch every time."""
    made = sequences(path)
    backend = FSDPBackend(spec(path, exact=True))
    mine = ([0, 1], [2], []) if dist.get_rank() == 0 else ([4, 5], [], [3, 6, 7])
    found = []
    for orders in product(permutations(range(3)), repeat=2):
        parts = [mine[i] for i in orders[dist.get_rank()]]
        found.append(gradients(backend, "shared", made, parts))
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare gradients up to rounding: norms and rotary positions compute in fp32."""
    assert found.keys() == expected.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], atol=1e-6 * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


SLOW = [pytest.param(each, marks=() if each == "qwen3_vl" else pytest.mark.slow) for each in FAMILIES]


@pytest.mark.parametrize("family", SLOW)
def test_gradients_depend_on_the_data_alone(family: str, saved, ranks: Callable[..., Ranks]) -> None:
    path = saved(family)
    (alone,) = ranks(1).run(all_divisions, path)
    expected = alone["one at a time"]
    assert all(bool(gradient.abs().sum()) for name, gradient in expected.items()), "a weight has no gradient"
    for found in alone.values():
        assert_equal(found, expected)
    for found in ranks(2).run(every_order, path):
        for gradient in found:
            assert_equal(gradient, expected)


def frozen_tower(path: Path) -> tuple[set[str], bool]:
    """The weights that are trained with a frozen tower, and whether the tower's were left alone by a step."""
    made = sequences(path)
    backend = FSDPBackend(spec(path, frozen=True))
    before = {name: weight.clone() for name, weight in backend.named_weights()}
    parts = WHOLE if dist.get_rank() == 0 else [[]]
    trained = set(gradients(backend, "shared", made, parts))
    gradients_of = make_micro_batch([made[2]], {}, [1.0], groups=[1], device=CPU)
    backend.forward_backward([gradients_of], loss)
    backend.step(1e-2)
    changed = {name for name, weight in backend.named_weights() if not torch.equal(weight, before[name])}
    return trained, bool(changed) and not any("visual" in name for name in changed)


def test_a_frozen_vision_tower_stays(saved, ranks: Callable[..., Ranks]) -> None:
    for trained, unchanged in ranks(2).run(frozen_tower, saved("qwen2_5_vl")):
        assert trained and not any("visual" in name for name in trained)
        assert unchanged
