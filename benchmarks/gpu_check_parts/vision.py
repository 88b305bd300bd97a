"""Whether engine and trainer see the same images: vision-language models with random weights, and discs of some colour.

The models are those of `examples/name_the_colour`, as they are and with the architecture of Qwen3-VL.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from gpu_check_parts.rollout import HIGHEST_KL, apart
from gpu_check_parts.setting import NotPossibleError, Numbers, Setting, inputs_of, one_process
from gpu_check_parts.training import make_backend
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.data import ImageProcessor
from iiverl_core.rollout import GenerationRequest, SamplingParams, generate, make_engine
from iiverl_core.samples import Prompt, SampleId, TokenSequence

EXAMPLE = Path(__file__).parents[2] / "examples" / "name_the_colour"
PROMPTS, RESPONSES, GENERATED = 8, 4, 8
QWEN3_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def vision(setting: Setting, *, engine: str) -> Numbers:
    """Compare an engine's log-probs of what it answered to images with the trainer's; the trainer then makes a step.

    Raises:
        ValueError: they differ, or the images do not matter.
    """
    if engine == "vllm" and find_spec("vllm") is None:
        raise NotPossibleError("vLLM is not installed")
    example = inputs_of(EXAMPLE)
    numbers: Numbers = {}
    with one_process(setting.device), TemporaryDirectory() as folder:
        path = Path(folder)
        example.make_model(path / "Qwen2.5-VL")
        _make_qwen3(path / "Qwen2.5-VL", path / "Qwen3-VL")
        # vLLM is started once: it takes most of the time.
        for name in ("Qwen2.5-VL", "Qwen3-VL") if engine == "hf" else ("Qwen2.5-VL",):
            _widen(path / name)
            numbers |= {
                f"{name} {key}": value
                for key, value in _compare(setting, path / name, engine, example).items()
            }
    return numbers


def _compare(setting: Setting, path: Path, engine: str, example: Any) -> Numbers:
    run = _configure(path, engine)
    trainer = make_backend(run, "actor", setting.device)
    generator = make_engine(run, setting.device)
    generator.update_weights(trainer.named_weights(), 1)
    processor = ImageProcessor(AutoProcessor.from_pretrained(path))
    requests = list(_requests(processor, example))
    params = SamplingParams(max_tokens=GENERATED, ignore_eos=True)
    sampled = [
        TokenSequence.single_turn(
            done.request.prompt_ids, done.token_ids, done.log_probs, images=tuple(done.request.images)
        )
        for done in generate(generator, requests, params)
    ]
    found = apart(setting, trainer, sampled)
    others = [each.images for each in sampled[1:]] + [sampled[0].images]
    swapped = [
        TokenSequence(each.token_ids, each.loss_mask, each.log_probs, images=images)
        for each, images in zip(sampled, others, strict=True)
    ]
    blind = apart(setting, trainer, swapped)["rollout/kl"]
    if not found["rollout/kl"] < min(HIGHEST_KL, blind / 2):
        raise ValueError(
            f"engine and trainer are apart: rollout/kl is {found['rollout/kl']:.3g} nats, and {blind:.3g} with the "
            "images of other prompts"
        )
    return {**found, "kl with other images": blind}


def _configure(path: Path, engine: str) -> RunConfig:
    """Make the configuration of a run with one process."""
    return run_config(
        build(
            {
                "data": {"max_prompt_length": 32, "max_response_length": 32},
                "actor_rollout_ref": {
                    "model": {"path": str(path)},
                    "rollout": {"name": engine, "tensor_model_parallel_size": 1},
                },
                "trainer": {"n_gpus_per_node": 1, "runtime": "local"},
            },
            "fsdp",
        )
    )


def _requests(processor: ImageProcessor, example: Any) -> Iterator[GenerationRequest]:
    """Ask for responses to discs, each of another colour."""
    rng = Random(0)
    text = processor.text_of_image + "="
    for row, colour in zip(range(PROMPTS), example.COLOURS, strict=False):
        disc = example.draw(colour, rng)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = processor.expand(ids, [processor.count_tokens(disc)])
        images = processor.prepare_prompt(Prompt(row, tuple(ids), text, images=(disc,)))
        for member in range(RESPONSES):
            yield GenerationRequest(SampleId("train", 1, row, member), ids, row, images)


def _make_qwen3(folder: Path, target: Path) -> None:
    """Save a random Qwen3-VL whose language model is as large as that of a Qwen2.5-VL, and its processor."""
    known: Any = AutoConfig.from_pretrained(folder)
    text = known.text_config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "max_position_embeddings", "eos_token_id", "pad_token_id")
    images = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={
            **{name: getattr(text, name) for name in sizes},
            "head_dim": text.hidden_size // text.num_attention_heads,
            "bos_token_id": None,
            "rope_parameters": {**text.rope_parameters, "mrope_interleaved": True},
        },
        vision_config=QWEN3_TOWER,
        **{name: getattr(known, name) for name in images},
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(target)
    AutoProcessor.from_pretrained(folder).save_pretrained(target)


def _widen(folder: Path) -> None:
    """Multiply a model's matrices: flat logits would hide mistakes."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for weight in model.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
