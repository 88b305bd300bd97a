"""Images in prompts: every form that datasets have them in, their tokens, and what is wrong with a row."""

import base64
import json
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from iiverl_core.config import build, run_config
from iiverl_core.data import DataError, ImageProcessor, PromptSet, load_image_processor, load_prompts
from iiverl_core.data.images import decode
from quickstart_fixtures import load_script
from vision_models import SIDE, png, save_processor, vision_config

RED, BLUE = png("red"), png((0, 0, 255), (3 * SIDE, 2 * SIDE))  # 2 and 6 tokens
ASK = [{"role": "user", "content": "<image>What is it?"}]
PARTS = [{"type": "text", "text": "?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model's configuration and processor, without weights."""
    path = tmp_path_factory.mktemp("model")
    save_processor(path)
    vision_config("qwen2_5_vl").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> ImageProcessor:
    return loaded(folder)


def loaded(folder: Path, **data: Any) -> ImageProcessor:
    lengths = {"max_prompt_length": 64, "max_response_length": 8}
    run = run_config(build({"data": lengths | data, "actor_rollout_ref": {"model": {"path": str(folder)}}}))
    found = load_image_processor(run)
    assert found is not None
    return found


def read(path: Path, processor: ImageProcessor | None, tokenizer: Any = None, **options: Any) -> PromptSet:
    return load_prompts(
        str(path),
        "train",
        processor.tokenizer if processor else tokenizer,
        images=processor,
        console=options.pop("console", Console(quiet=True)),
        **{"max_prompt_length": 200, **options},
    )


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def reference_ids(processor: ImageProcessor, chat: Any, images: list[bytes]) -> list[int]:
    """The ids that transformers' processor gives."""
    text = processor.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    decoded = [decode(each) for each in images]
    return processor.processor(text=[text], images=decoded or None)["input_ids"][0]


def test_a_parquet_like_geometry3k(processor: ImageProcessor, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": "hiyouga/geometry3k",
            "prompt": [{"role": "user", "content": "<image>Find x.\nThen <image>."}],
            "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "b.png"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "3"},
            "extra_info": {"index": 0},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    prompts = read(tmp_path / "train.parquet", processor)
    prompt = prompts[0]
    image, text = {"type": "image"}, "Find x.\nThen "
    chat = [
        {
            "role": "user",
            "content": [image, {"type": "text", "text": text}, image, {"type": "text", "text": "."}],
        }
    ]
    assert list(prompt.ids) == reference_ids(processor, chat, [RED, BLUE])
    assert prompt.ids.count(processor.token_id) == 2 + 6
    assert prompt.images == (RED, BLUE) and prompt.ground_truth == "3"
    assert prompt.chat == tuple(rows[0]["prompt"])
    assert "images" not in prompt.columns and prompts.has_images
    assert prompt.tokens_only().images == () and prompt.for_engine().images == prompt.images
    first, second = processor.prepare_prompt(prompt)
    assert [each.image.grid.tolist() for each in (first, second)] == [[1, 2, 4], [1, 4, 6]]
    assert [each.image.pixel_values.shape for each in (first, second)] == [(8, 96), (24, 96)]
    for start, image in (first, second):
        assert prompt.ids[start - 1] != processor.token_id != prompt.ids[start + image.tokens]
        assert set(prompt.ids[start : start + image.tokens]) == {processor.token_id}
    shown = replace(processor, makes_thumbnails=True).prepare(png("red", (900, 300))).thumbnail
    assert Image.open(BytesIO(shown)).size == (96, 32) and len(shown) < 2000
    assert first.image.thumbnail == b"" and first.image.digest != second.image.digest


def test_columns_of_datasets_images_are_not_decoded(processor: ImageProcessor, tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {"problem": Value("string"), "images": List(ImageFeature()), "thumbnail": ImageFeature()}
    )
    rows = {
        "problem": ["<image>What?", "no image"],
        "images": [[{"bytes": RED, "path": None}], []],
        "thumbnail": [{"bytes": BLUE, "path": None}, None],
    }
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    prompts = read(tmp_path / "saved", processor, prompt_key="problem")
    assert [prompt.images for prompt in prompts] == [(RED,), ()]
    assert prompts[0].columns["thumbnail"]["bytes"] == BLUE
    text = "<|vision_start|>" + "<|image_pad|>" * 2 + "<|vision_end|>What?"
    assert prompts[0].text == text  # a plain string has no template, and images as the template writes them


@pytest.mark.parametrize(
    "image",
    [
        data_url(RED),
        "red.png",
        {"path": "red.png"},
        {"url": data_url(RED)},
        {"bytes": None, "path": "red.png"},
        [{"image": "red.png"}],
    ],
)
def test_forms_of_images(image: Any, processor: ImageProcessor, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    prompts = read(write(tmp_path / "a.jsonl", {"prompt": ASK, "images": image}), processor)
    assert prompts[0].images == (RED,)
    assert prompts[0].ids.count(processor.token_id) == 2


@pytest.mark.parametrize("as_text", [False, True])
def test_parts_as_the_openai_api_has_them(as_text: bool, processor: ImageProcessor, tmp_path: Path) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(BLUE)}},
        {"type": "text", "text": "Or this: "},
        {"type": "image", "image": data_url(RED)},
    ]
    chat = [{"role": "system", "content": "Look."}, {"role": "user", "content": parts}]
    prompts = read(write(tmp_path / "a.jsonl", {"prompt": json.dumps(chat) if as_text else chat}), processor)
    assert prompts[0].images == (BLUE, RED)
    assert prompts[0].chat == (chat[0], {"role": "user", "content": "<image>Or this: <image>"})
    plain = [chat[0], {"role": "user", "content": [{"type": "image"}, parts[1], {"type": "image"}]}]
    assert list(prompts[0].ids) == reference_ids(processor, plain, [BLUE, RED])
    column = [{"type": "image"}, {"type": "text", "text": "!"}]
    row = {"prompt": [{"role": "user", "content": column}], "images": data_url(RED)}
    assert read(write(tmp_path / "b.jsonl", row), processor)[0].images == (RED,)


JPEG = BytesIO()
Image.effect_noise((64, 64), 90).convert("RGB").save(JPEG, "JPEG")
WRONG = {
    "missing": ({"prompt": ASK, "images": "gone.png"}, "cannot be read: gone.png"),
    "no image": ({"prompt": ASK, "images": data_url(b"text")}, "cannot be decoded"),
    "a PNG that is cut off": ({"prompt": ASK, "images": data_url(RED[:-40])}, "cannot be decoded"),
    "a JPEG that is cut off": (
        {"prompt": ASK, "images": data_url(JPEG.getvalue()[:900])},
        "cannot be decoded",
    ),
    "wrong base64": ({"prompt": ASK, "images": "data:image/png;base64,a"}, "base64"),
    "an address": ({"prompt": ASK, "images": "https://example.org/a.png"}, "download"),
    "another type": ({"prompt": ASK, "images": 3}, "an image of type int"),
    "none": ({"prompt": ASK, "images": []}, "has 1 placeholder <image> and 0 images"),
    "too many": ({"prompt": ASK, "images": [data_url(RED)] * 2}, "has 1 placeholder <image> and 2 images"),
    "no placeholder": (
        {"prompt": [{"role": "user", "content": "?"}], "images": data_url(RED)},
        "has 0 placeholders <image> and 1 image;",
    ),
    "the model's own token": (
        {"prompt": [{"role": "user", "content": "<image><|image_pad|>"}], "images": data_url(RED)},
        "the chat template writes 2",
    ),
    "a video": (
        {"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "images": None},
        "message 0 is of type 'video'",
    ),
    "too narrow": (
        {"prompt": ASK, "images": data_url(png("red", (900, 2)))},
        "the model's processor rejects",
    ),
    "in two places": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image", "image": data_url(RED)}]}],
            "images": data_url(RED),
        },
        "leave one of them out",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_image_is_reported_with_file_and_row(
    what: str, processor: ImageProcessor, tmp_path: Path
) -> None:
    row, message = WRONG[what]
    right = {"prompt": ASK, "images": data_url(RED)}
    file = write(tmp_path / "a.jsonl", right, right, row)
    with pytest.raises(DataError, match=r"a\.jsonl, row 2 ") as error:
        read(file, processor)
    assert message in str(error.value)


def test_image_tokens_count_as_length(processor: ImageProcessor, tmp_path: Path) -> None:
    small, large = ({"prompt": ASK, "images": data_url(each)} for each in (RED, BLUE))
    file = write(tmp_path / "a.jsonl", small, large)
    length = len(read(file, processor)[0].ids)
    assert [p.source_row for p in read(file, processor, max_prompt_length=length, filter_overlong=True)] == [
        0
    ]
    for truncation in ("error", "left", "right"):
        with pytest.raises(DataError, match=r"row 1 .*\n.*never truncated") as error:
            read(file, processor, max_prompt_length=length, truncation=truncation)
        assert f"the prompt has {length + 4} tokens" in str(error.value)


def test_pixels_are_limited(folder: Path, processor: ImageProcessor) -> None:
    assert processor.count_tokens(BLUE) == 6
    less, more = loaded(folder, max_pixels=2 * SIDE**2), loaded(folder, min_pixels=12 * SIDE**2)
    assert less.count_tokens(BLUE) == 1 and less.count_tokens(RED) == 2
    assert more.count_tokens(BLUE) >= 12


def test_the_record_of_a_run_changes_with_its_images(processor: ImageProcessor, tmp_path: Path) -> None:
    rows = [{"prompt": ASK, "images": data_url(png(color))} for color in ("red", "blue")]
    first, second = (read(write(tmp_path / f"{i}.jsonl", row), processor) for i, row in enumerate(rows))
    assert first[0].ids == second[0].ids
    assert first.fingerprint()["prompts"] != second.fingerprint()["prompts"]


def test_what_is_transparent_is_white() -> None:
    corner = np.asarray(decode(png((255, 0, 0, 0), mode="RGBA")))[-1, -1]
    assert corner.tolist() == [255, 255, 255]


def test_a_model_of_texts_says_that_it_reads_no_images(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    file = write(tmp_path / "a.jsonl", {"prompt": ASK, "images": [{"path": "red.png"}]})
    said = Console(record=True, file=StringIO())
    prompts = read(file, None, tiny_tokenizer, console=said)
    assert not prompts.has_images and "are not used, since the model reads texts only" in said.export_text()
    with pytest.raises(DataError, match="the model reads texts only"):
        read(
            write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": PARTS}]}),
            None,
            tiny_tokenizer,
        )


def test_the_rows_of_the_example_for_geometry3k(processor: ImageProcessor, tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    script = load_script(Path(__file__).parents[2] / "examples" / "grpo_geo3k" / "prepare.py")
    features = Features(
        {"images": List(ImageFeature()), "problem": Value("string"), "answer": Value("string")}
    )
    row = {"images": [{"bytes": RED, "path": None}], "problem": "<image>Find x.", "answer": "3"}
    script.convert(Dataset.from_list([row], features=features)).to_parquet(tmp_path / "train.parquet")
    prompts = read(tmp_path / "train.parquet", processor, max_prompt_length=400)
    assert prompts[0].images == (RED,) and prompts[0].ground_truth == "3"
    assert prompts[0].data_source == "hiyouga/geometry3k"
