"""Create the inputs of `name_the_colour`: a random vision-language model, and images to look at. Downloads nothing.

Writes to `inputs/`: `model/`, a tiny Qwen2.5-VL with random weights and its processor, and the datasets `train.parquet` and
`val.parquet`, with the columns of geometry3k as II-VERL and verl store it: `prompt`, a chat with `<image>` where the image
goes, and `images`, a list of encoded images.
"""

import random
from io import BytesIO
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SIDE = 24  # pixels along each side of an image
PATCH = 4  # pixels along each side of a patch; 2 x 2 patches are a token
TRAIN_IMAGES, VALIDATION_IMAGES = 1024, 64
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}="
)


def make_model(folder: Path) -> None:
    """Save a random Qwen2.5-VL with two layers in its vision tower and two after it, and its processor."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*COLOURS, "="])}, unk_token="="))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Sequence([])
    special = ["<end>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens(special[:1])
    words.add_tokens(
        [AddedToken(token, normalized=False) for token in special[1:]]
    )  # in a response, they are words
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": SIDE**2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=sizes, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=sizes, **patches),
        chat_template=TEMPLATE,
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
                "eos_token_id": ids["<end>"],
                "pad_token_id": ids["<end>"],
                "bos_token_id": None,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [8, 4, 4],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": PATCH,
                "window_size": 4 * PATCH,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def draw(colour: str, rng: random.Random) -> bytes:
    """Draw a disc of a shade of a colour somewhere on a grey background, as PNG."""
    from PIL import Image, ImageDraw

    grey = rng.randint(90, 160)
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    shade = tuple(min(max(value + rng.randint(-20, 20), 0), 255) for value in COLOURS[colour])
    radius = rng.randint(SIDE // 4, SIDE // 3)
    x, y = (rng.randint(radius, SIDE - radius) for _ in range(2))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_data(folder: Path) -> None:
    """Draw the images, as many of each colour."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    for name, count in {"train": TRAIN_IMAGES, "val": VALIDATION_IMAGES}.items():
        colours = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
        rng.shuffle(colours)
        rows = [
            {
                "data_source": "colour",
                "prompt": [{"role": "user", "content": "<image>"}],
                "images": [{"bytes": draw(colour, rng), "path": None}],
                "reward_model": {"style": "rule", "ground_truth": colour},
            }
            for colour in colours
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


if __name__ == "__main__":
    INPUTS.mkdir(exist_ok=True)
    make_data(INPUTS)
    make_model(INPUTS / "model")
    print(
        "made a model that has never seen a colour, and images to name, in examples/name_the_colour/inputs/"
    )
