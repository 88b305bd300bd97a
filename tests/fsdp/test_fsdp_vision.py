"""Vision-language models: trainer, engine and transformers agree, and gradients depend on the data alone."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from iiverl_core.config import FSDPConfig, ModelConfig, OptimConfig
from iiverl_core.data import ImageProcessor
from iiverl_core.data.images import decode
from iiverl_core.rollout import GenerationRequest, RolloutRequest, SamplingParams, run_rollouts
from iiverl_core.rollout.environments import EnvironmentRollouter
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.samples import Prompt, SampleId, TokenSequence
from iiverl_core.training import LayoutKind, MicroBatch, ModelSpec, Outputs, Role
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_core.training.layout import PlacedImages
from iiverl_core.training.vision import hidden_states, sequence_vision
from iiverl_fsdp.backend import FSDPBackend
from iiverl_reward_client import Scored
from ranks import Ranks
from rollout.scripted import environment_run
from vision_models import FAMILIES, SEEN, SIDE, png, save_vision_model

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
    seen = processor.text_of_image  # InternVL's processor adds the tokens around an image
    found = []
    for row, (text, images) in enumerate(SIGHTS.items()):
        text = text.replace(SEEN, seen)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = processor.expand(ids, [processor.count_tokens(each) for each in images])
        marked = text.removeprefix("u:").removesuffix(";a:")
        chat = {"role": "user", "content": marked.replace(seen, "<image>")}
        found.append(Prompt(row, tuple(ids), text, chat=(chat,), images=images))
    return processor, found


def sequences(path: Path, n: int = 2) -> list[TokenSequence]:
    """`n` sequences per prompt, of uneven lengths; some have image tokens that the policy sampled.

    Those of the last prompt have equal tokens up to their second response, but before it an image that differs.
    """
    processor, all_prompts = prompts(path)
    rng = np.random.default_rng(0)
    made = []
    for prompt in all_prompts:
        images = processor.prepare_prompt(prompt)
        for member in range(n):
            response = rng.integers(0, 256, rng.integers(2, 7))
            response[rng.random(len(response)) < 0.3] = processor.token_id
            zeros = np.zeros(len(response), dtype=np.float32)
            sequence = TokenSequence.single_turn(prompt.ids, response, zeros, images=images)
            if prompt is all_prompts[-1]:
                first = np.arange(5) + 97
                first[2] = processor.token_id
                sequence = TokenSequence.single_turn(
                    prompt.ids, first, np.zeros(5, np.float32), images=images
                )
                sequence = with_turn(processor, sequence, (RED, png("yellow"))[member % 2], response)
            made.append(sequence)
    return made


def with_turn(
    processor: ImageProcessor, sequence: TokenSequence, image: bytes, response: np.ndarray
) -> TokenSequence:
    """The sequence with an image after it, and a further response."""
    ids = processor.tokenizer(f";u:{processor.text_of_image};a:", add_special_tokens=False)
    between, placed = processor.place(ids["input_ids"], [processor.prepare(image)], len(sequence.token_ids))
    mask = np.arange(len(between) + len(response)) >= len(between)
    return TokenSequence(
        np.concatenate([sequence.token_ids, between, response]),
        np.concatenate([sequence.loss_mask, mask]),
        np.concatenate([sequence.log_probs, np.zeros(len(mask), dtype=np.float32)]),
        images=(*sequence.images, *placed),
    )


def spec(
    path: Path,
    *,
    role: Role = "actor",
    packed: bool | None = None,
    frozen: bool = False,
    exact: bool = False,
    lora_rank: int = 0,
) -> ModelSpec:
    """The model of a role at `path`; `exact` computes in fp64, which no configuration offers."""
    parallel = FSDPConfig(mixed_precision=FP32)
    if exact:
        precision = parallel.mixed_precision.model_copy(update=FP64)
        parallel = parallel.model_copy(update={"mixed_precision": precision, "model_dtype": "fp64"})
    return ModelSpec(
        role=role,
        model=ModelConfig(
            path=str(path),
            use_remove_padding=packed,
            enable_gradient_checkpointing=packed is None,
            lora_rank=lora_rank,
        ),
        parallel=parallel,
        device=CPU,
        optim=None if role == "reward" else OptimConfig(lr=1e-2),
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


def test_features_may_be_joined_as_older_transformers_did(
    saved, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    path = saved("qwen3_vl")
    backend, made = FSDPBackend(spec(path)), sequences(path)
    batch = make_micro_batch(made, {}, [0.0] * len(made), device=CPU)
    (apart,) = backend.forward([batch])
    features = Qwen3VLModel.get_image_features

    def joined(self: Any, *arguments: Any, **options: Any) -> Any:
        seen = features(self, *arguments, **options)
        seen.pooler_output = torch.cat(tuple(seen.pooler_output))
        seen.deepstack_features = [torch.cat(tuple(layer)) for layer in seen.deepstack_features]
        return seen

    monkeypatch.setattr(Qwen3VLModel, "get_image_features", joined)
    (together,) = backend.forward([batch])
    assert torch.equal(together.log_probs_T, apart.log_probs_T)


def answers(engine: Any, path: Path, max_tokens: int = 6) -> list[TokenSequence]:
    """Three sampled responses to each prompt, as sequences in the order of prompts and members."""
    processor, all_prompts = prompts(path)
    for prompt in all_prompts:
        inputs = processor.prepare_prompt(prompt)
        for member in range(3):
            request = GenerationRequest(
                SampleId("train", 1, prompt.row, member), prompt.ids, prompt.row, inputs
            )
            engine.submit(request, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return responses(engine)


def responses(engine: Any) -> list[TokenSequence]:
    """What an engine answers, as sequences in the order of prompts and members."""
    done = []
    while engine.pending:
        done += engine.step()
    done.sort(key=lambda each: each.request.id)
    return [
        TokenSequence.single_turn(
            each.request.prompt_ids, each.token_ids, each.log_probs, images=tuple(each.request.images)
        )
        for each in done
    ]


def second_turns(engine: Any, path: Path, first: list[TokenSequence]) -> list[TokenSequence]:
    """Responses to the first ones and a further image, which differs between the members of a group."""
    processor = prompts(path)[0]
    for i, sequence in enumerate(first):
        ids = sequence.token_ids.copy()
        ids[-1] = processor.token_id  # as if the policy had sampled it
        image = (RED, BLUE, png("yellow"))[i % 3]
        turn = with_turn(processor, replace(sequence, token_ids=ids), image, np.empty(0, np.int64))
        request = GenerationRequest(
            SampleId("train", 1, i // 3, i % 3), turn.token_ids.tolist(), i, turn.images
        )
        engine.submit(request, SamplingParams(max_tokens=4, ignore_eos=True))
    return responses(engine)


EYES = '''
import io
from PIL import Image
from iiverl_core.environment import Turn


class Environment:
    """Answers with an image of another colour for each rollout, and with none in between."""

    def reset(self, row):
        self.turns, self.row = 0, row
        if len(row["images"]) == 1:
            return [{"role": "user", "content": ["first ", Image.open(io.BytesIO(row["images"][0])), "<|image_pad|>"]}]

    def step(self, message):
        self.turns += 1
        image = Image.new("RGB", (16 + 8 * (self.turns // 2), 8), (self.row["seed"] % 256, 0, 0))
        answer = "again" if self.turns == 2 else ["so ", {"type": "image", "image": image}, "?"]
        return Turn([{"role": "user", "content": answer}], done=self.turns == 4)
'''


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_images_of_later_turns_are_seen_as_the_trainer_does(
    family: str, saved, one_rank: None, tmp_path: Path
) -> None:
    path = saved(family)
    processor, all_prompts = prompts(path)
    (tmp_path / "eyes.py").write_text(EYES)
    run = environment_run(tmp_path / "eyes.py", tmp_path, responses=120)
    rollouter = EnvironmentRollouter(run, processor.tokenizer, processor)
    engine, backend = HFEngine(str(path), dtype=torch.float32, device="cpu"), FSDPBackend(spec(path))
    engine.update_weights(backend.named_weights(), 1)
    asked = [
        RolloutRequest(SampleId("train", 1, prompt.row, member), prompt, 7, processor.prepare_prompt(prompt))
        for prompt in all_prompts
        for member in range(2)
    ]
    try:
        done = list(run_rollouts(engine, rollouter, asked, SamplingParams(max_tokens=5, ignore_eos=True)))
    finally:
        rollouter.close()
    done.sort(key=lambda each: each.id)
    assert [str(each.outcome) for each in done if not isinstance(each.outcome, Scored)] == []
    for each in done:
        (sequence,) = each.sequences
        assert len(each.turns) == 4 and len(sequence.images) == len(each.prompt.images) + 2
        text = "".join(message["content"] for message in each.messages or () if message["role"] == "user")
        assert text.count("<image>") == len(each.images)
        assert [image for _, image in sequence.images] == list(each.images)
    made = [each.sequences[0] for each in done]
    assert made[0].images[0].image.digest != made[1].images[0].image.digest
    groups = [each.id.group for each in done]
    (shared,) = backend.forward([make_micro_batch(made, {}, [0.0] * 8, groups=groups, device=CPU)])
    engines = torch.from_numpy(np.concatenate([each.trained_log_probs for each in made]))
    torch.testing.assert_close(shared.log_probs_T, engines, atol=1e-5, rtol=0)
    usual = [each for each in made if processor.token_id not in each.token_ids[each.loss_mask]]
    assert usual
    reference = torch.cat([whole_log_probs(path, each) for each in usual])
    kept = torch.from_numpy(np.concatenate([each.trained_log_probs for each in usual]))
    torch.testing.assert_close(kept, reference, atol=1e-5, rtol=0)


@torch.no_grad()
def whole_log_probs(path: Path, sequence: TokenSequence) -> torch.Tensor:
    """Log-probs of the trained tokens by transformers alone, which finds the images by their tokens."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.from_numpy(sequence.token_ids)
    inputs = {"pixel_values": np.concatenate([each.pixel_values for _, each in sequence.images])}
    if sequence.images[0].image.grid.size:
        inputs["image_grid_thw"] = np.stack([each.grid for _, each in sequence.images])
        inputs["mm_token_type_ids"] = (sequence.token_ids == model.config.image_token_id)[None].astype(int)
    logits = model(
        input_ids=ids[None], **{name: torch.from_numpy(value) for name, value in inputs.items()}
    ).logits[0]
    at = torch.from_numpy(np.flatnonzero(sequence.loss_mask))
    return logits.log_softmax(-1)[at - 1, ids[at]]


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

    small = {"max_model_len": 96, "max_num_seqs": 16, "max_num_batched_tokens": 1024}
    memory = {"kv_cache_memory_bytes": 2**25, "block_size": 32, "enforce_eager": True}
    arguments = {"model": str(path), "dtype": "float32", "load_format": "dummy", **small, **memory, **FIXED}
    backend = FSDPBackend(spec(path))
    engine = VLLMEngine({**arguments, "disable_log_stats": True}, bucket_bytes=2**14)
    differences = []
    for version in range(2):
        engine.update_weights(backend.named_weights(), version)
        made = answers(engine, path)
        made += second_turns(engine, path, made)
        groups = [i // 3 for i in range(len(made))]
        batch = make_micro_batch(made, {}, [0.1] * len(made), groups=groups, device=CPU)
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
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(response)[None]], 1)
        inputs.pop("attention_mask")
        logits = model(**inputs).logits[0, len(prompt.ids) - 1 : -1]
        found.append(logits.log_softmax(-1)[torch.arange(len(response)), response])
    return torch.cat(found)


def loss(outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    given = outputs.log_probs_T if outputs.values_T is None else outputs.values_T
    assert given is not None
    return (given * batch.weights_T).sum(), {}


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
    """Gradients on this rank of a text, an image and no work beside each of the other rank's: the same batch every time."""
    made = sequences(path)
    backend = FSDPBackend(spec(path, exact=True))
    mine = ([0, 1], [2], []) if dist.get_rank() == 0 else ([4, 5], [], [3, 6, 7])
    found = []
    for order in permutations(range(3)):
        parts = list(mine) if dist.get_rank() == 0 else [mine[i] for i in order]
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


@pytest.fixture(scope="module")
def with_head(saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head for one number, as a critic that was trained or a reward model has it."""
    path = tmp_path_factory.mktemp("head")
    copytree(saved("qwen2_5_vl"), path, dirs_exist_ok=True)
    weights = load_file(path / "model.safetensors")
    weights["score.weight"] = torch.linspace(-2, 2, 32)[None]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def values_by_division(path: Path) -> dict[str, Any]:
    """Gradients of a critic's weighted values by division, its values, and a reward model's scores."""
    made = sequences(path)
    backend = FSDPBackend(spec(path, role="critic", exact=True))
    assert backend.layout == "shared"
    found: dict[str, Any] = {
        name: gradients(backend, layout, made, parts) for name, (layout, parts) in DIVISIONS.items()
    }
    padded = FSDPBackend(spec(path, role="critic", packed=False, exact=True))
    found["padded"] = gradients(padded, "padded", made, WHOLE)
    return found


def numbers_of(path: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A critic's values of all sequences in one micro-batch, and a reward model's scores one by one and together."""
    made = sequences(path)
    batches = [
        make_micro_batch(each, {}, [0.0] * len(each), device=CPU) for each in (made, *([s] for s in made))
    ]
    (outputs, *_) = FSDPBackend(spec(path, role="critic")).forward(batches[:1])
    together, *alone = FSDPBackend(spec(path, role="reward")).forward(batches)
    assert outputs.values_T is not None and together.scores_B is not None
    return outputs.values_T, [together.scores_B, torch.cat([each.scores_B for each in alone])]


def values_on_ranks(path: Path) -> dict[str, torch.Tensor]:
    """Gradients on this rank of a critic's part of the work: texts here, images there, and unequal numbers of both."""
    made = sequences(path)
    parts = [[0, 1], [2], []] if dist.get_rank() == 0 else [[4, 5], [], [3, 6, 7]]
    return gradients(FSDPBackend(spec(path, role="critic", exact=True)), "shared", made, parts)


def test_critics_and_reward_models_read_images(with_head: Path, ranks: Callable[..., Ranks]) -> None:
    (alone,) = ranks(1).run(values_by_division, with_head)
    expected = alone["one at a time"]
    assert all(bool(gradient.abs().sum()) for gradient in expected.values()), "a weight has no gradient"
    for found in alone.values():
        assert_equal(found, expected)
    for found in ranks(2).run(values_on_ranks, with_head):
        assert_equal(found, expected)
    ((values, scores),) = ranks(1).run(numbers_of, with_head)
    by_hand, last = zip(*(whole_values(with_head, each) for each in sequences(with_head)), strict=True)
    torch.testing.assert_close(values, torch.cat(by_hand), atol=1e-5, rtol=1e-5)
    for each in scores:
        torch.testing.assert_close(each, torch.stack(last), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def whole_values(path: Path, sequence: TokenSequence) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's output at the tokens before trained ones, and at the last token, by transformers' model alone."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    vision = sequence_vision(model, sequence.token_ids, sequence.images)
    placed = PlacedImages.place(
        [vision], np.arange(1), [np.arange(len(vision.mask))], (1, len(vision.mask)), CPU
    )
    hidden = hidden_states(
        model, torch.from_numpy(sequence.token_ids)[None], torch.from_numpy(vision.positions)[:, None], placed
    )
    numbers = (hidden[0] @ load_file(path / "model.safetensors")["score.weight"].T)[:, 0]
    return numbers[np.flatnonzero(sequence.loss_mask) - 1], numbers[-1]


def adapters_by_division(path: Path) -> tuple[dict[str, Any], float, set[str]]:
    """Gradients of adapters by division, how far the engine with merged weights is from them, and those of a frozen tower."""
    made = sequences(path)
    backend = FSDPBackend(spec(path, lora_rank=4))
    rng = torch.Generator().manual_seed(0)
    for name, weight in backend._model.named_parameters():
        if ".lora_B." in name:  # zeros have no effect
            local = weight.data.to_local() if isinstance(weight.data, DTensor) else weight.data
            local.copy_(torch.randn(weight.shape, generator=rng) / 4)
    names = ("shared, one micro-batch", "shared, groups torn", "one at a time", "with dummies")
    found = {name: gradients(backend, DIVISIONS[name][0], made, DIVISIONS[name][1]) for name in names}
    engine = HFEngine(str(path), dtype=torch.float32, device="cpu")
    engine.update_weights(backend.named_weights(), 1)
    answered = answers(engine, path, 4)
    batch = make_micro_batch(answered, {}, [0.0] * 12, groups=[i // 3 for i in range(12)], device=CPU)
    (outputs,) = backend.forward([batch])
    (plain,) = backend.forward([batch], adapter=False)
    assert outputs.log_probs_T is not None and plain.log_probs_T is not None
    engines = torch.from_numpy(np.concatenate([each.trained_log_probs for each in answered]))
    assert (plain.log_probs_T - engines).abs().max() > 0.1
    frozen = FSDPBackend(spec(path, lora_rank=4, frozen=True))
    trained = {name for name, _ in frozen.named_weights(adapters="only")}
    return found, float((outputs.log_probs_T - engines).abs().max()), trained


def test_adapters_learn_from_images_and_reach_the_engine(saved, ranks: Callable[..., Ranks]) -> None:
    path = saved("qwen3_vl")
    ((found, off, frozen),) = ranks(1).run(adapters_by_division, path)
    assert off < 1e-5
    expected = found["one at a time"]
    assert any("visual" in name for name in expected) and any("language_model" in name for name in expected)
    assert all(".lora_" in name and bool(gradient.abs().sum()) for name, gradient in expected.items())
    for each in found.values():
        assert_equal(each, expected)
    assert frozen and not any("visual" in name for name in frozen)
