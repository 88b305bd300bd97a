"""Vision-language models with random weights, and their processors, small enough to be made on the spot."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATCH, MERGE = 4, 2
SIDE = PATCH * MERGE
"""Pixels along a side of what one image token covers."""
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
SPECIAL = ("<pad>", "<end>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
"""The tokens of an image in the text of a chat template."""
TILED = TEMPLATE.replace(SEEN, "<|image_pad|>")
"""A template of InternVL, whose processor adds the others."""


TILED_TOKENS = {
    "start_image_token": "<|vision_start|>",
    "end_image_token": "<|vision_end|>",
    "context_image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}


def png(color: tuple[int, ...] | str, size: tuple[int, int] = (2 * SIDE, SIDE), mode: str = "RGB") -> bytes:
    """Encode an image of one color, (width, height) pixels, with a darker corner."""
    from PIL import Image

    image = Image.new(mode, size, color)
    image.paste(Image.new(mode, (size[0] // 2, size[1] // 2), "black"), (0, 0))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def save_processor(folder: Path, family: str = "qwen2_5_vl") -> None:
    """Save a processor of a family, whose tokenizer has one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    letters.add_special_tokens(list(SPECIAL))
    tiled = family == "internvl"
    named = {"extra_special_tokens": TILED_TOKENS} if tiled else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=TILED if tiled else TEMPLATE,
        **named,
    )
    if tiled:
        _tiled_processor(tokenizer).save_pretrained(folder)
        return
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    limits = {"shortest_edge": SIDE * SIDE, "longest_edge": 16 * SIDE * SIDE}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=limits, **sizes),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)


def _tiled_processor(tokenizer: Any) -> Any:
    """A processor of InternVL: images are tiles of 4 tokens, and a small image of the whole if there are several."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": 2 * SIDE, "width": 2 * SIDE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=3),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TILED,
    )


def vision_config(family: str, **text: Any) -> Any:
    """Make the configuration of a tiny model of a family."""
    from transformers import AutoConfig

    vocabulary = 256 + len(SPECIAL)
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 257,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    } | text
    half = common.get("head_dim", 8) // 2
    common["rope_parameters"]["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    tower: dict[str, Any]
    if family == "internvl":
        common["rope_parameters"].pop("mrope_section")
        tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        tower |= {"image_size": [2 * SIDE, 2 * SIDE], "patch_size": [PATCH, PATCH]}
        return AutoConfig.for_model(
            family,
            text_config={"model_type": "qwen2", **common},
            vision_config=tower,
            image_token_id=256 + SPECIAL.index("<|image_pad|>"),
            image_seq_length=4,
            tie_word_embeddings=False,
        )
    tower = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 16, "hidden_size": common["hidden_size"], "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        tower |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": common["hidden_size"],
            "window_size": 2 * SIDE,
        }
        tower |= {"fullatt_block_indexes": [1]}
    else:
        common.setdefault("head_dim", 8)
        common["rope_parameters"]["mrope_interleaved"] = True
        tower |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": common["hidden_size"]}
        tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {name: 256 + SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    return AutoConfig.for_model(
        family,
        text_config=common,
        vision_config=tower,
        image_token_id=256 + SPECIAL.index("<|image_pad|>"),
        video_token_id=256 + SPECIAL.index("<|video_pad|>"),
        **{f"{name}_token_id": id for name, id in ids.items()},
    )


def save_vision_model(folder: Path, family: str, **text: Any) -> "PreTrainedModel":
    """Save a random fp32 model of a family with its processor, and return it; `text` changes its language model."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            vision_config(family, **text), dtype=torch.float32
        ).eval()
        for weight in model.parameters():  # flat logits would hide mistakes
            weight.data.mul_(4 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    save_processor(folder, family)
    return model
