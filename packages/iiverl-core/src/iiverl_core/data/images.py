"""Images of prompts: read them from rows, check them, count their tokens, and prepare them for a model.

Images stay encoded from the dataset to the process that generates, and only there become pixels.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iiverl_core.columns import IMAGE
from iiverl_core.config import DataConfig, RunConfig
from iiverl_core.config.model_facts import VISION_LANGUAGE
from iiverl_core.data.chat import Messages, PromptError, write_chat
from iiverl_core.errors import ConfigError
from iiverl_core.samples import ImageInputs, Prompt, SequenceImage

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

THUMBNAIL_PIXELS = 96
"""Pixels along the longer side of a thumbnail."""

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True)
class ImageProcessor:
    """Prepares images as a model's own processor does.

    `processor` has the model's image processor and tokenizer. With `makes_thumbnails`, prepared images have one.
    """

    processor: "ProcessorMixin"
    makes_thumbnails: bool = False

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the processor."""
        return self.processor.tokenizer  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def token_id(self) -> int:
        """The token that stands for a part of an image."""
        return int(self.processor.image_token_id)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _images(self) -> Any:
        return self.processor.image_processor  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _tokens_of_tile(self) -> int | None:
        """Tokens of each tile of an image; None if an image is patches in a grid."""
        return getattr(self.processor, "image_seq_length", None)

    @cached_property
    def _options(self) -> dict[str, Any]:
        """The arguments with which the processor calls its image processor."""
        return dict(self.processor.valid_processor_kwargs._defaults.get("images_kwargs", {}))

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """Tokens that the processor, rather than the chat template, puts before and after those of an image."""
        names = ("start_image_token_id", "end_image_token_id")
        before, after = (getattr(self.processor, name, None) for name in names)
        return ([] if before is None else [before], [] if after is None else [after])

    def count_tokens(self, encoded: bytes) -> int:
        """Decode an image, and count the tokens that the model reads for it.

        Raises:
            PromptError: it is no image, is cut off, or has sides that the processor rejects.
        """
        width, height = check_image(encoded)
        try:
            patches = self._images.get_number_of_image_patches(height, width, self._options)
        except ValueError as error:
            raise PromptError(f"has an image that the model's processor rejects: {error}") from error
        tiled = self._tokens_of_tile
        return patches * tiled if tiled else patches // self._images.merge_size**2

    def expand(self, ids: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Repeat each image token of a rendered prompt as often as its image has tokens.

        Raises:
            PromptError: there are more or fewer image tokens than images.
        """
        found = ids.count(self.token_id)
        if found != len(counts):
            raise PromptError(
                f"has {_number(len(counts), 'image')}, and the chat template writes {found} of the model's image tokens; "
                "use the model's own chat template"
            )
        numbers, (before, after) = iter(counts), self._around
        expanded: list[int] = []
        for id in ids:
            if id == self.token_id:
                expanded += [*before, *[id] * next(numbers), *after]
            else:
                expanded.append(id)
        return expanded

    def place(
        self, ids: Sequence[int], images: Sequence[ImageInputs], start: int = 0
    ) -> tuple[list[int], list[SequenceImage]]:
        """Expand the ids of a rendered text, and return where its images are if it begins at position `start`.

        Raises as `expand`.
        """
        expanded = self.expand(ids, [image.tokens for image in images])
        firsts = self._first_tokens(expanded, images) if images else []
        return expanded, [
            SequenceImage(start + first, image) for first, image in zip(firsts, images, strict=True)
        ]

    def _first_tokens(self, ids: Sequence[int], images: Sequence[ImageInputs]) -> list[int]:
        """Return the positions of the first token of each image in expanded ids."""
        at = [position for position, id in enumerate(ids) if id == self.token_id]
        return [at[first] for first in accumulate((image.tokens for image in images[:-1]), initial=0)]

    def prepare(self, encoded: bytes) -> ImageInputs:
        """Compute what the model reads of an image.

        Raises:
            PromptError: it is no image, is cut off, or has sides that the processor rejects.
        """
        try:
            image = decode(encoded)
            prepared = self._images(images=[image], return_tensors="np", **self._options)
        except Exception as error:  # of the library that decodes, or of the processor
            raise PromptError(f"has an image that cannot be read: {error}") from error
        pixels, tiled = np.asarray(prepared["pixel_values"], dtype=np.float32), self._tokens_of_tile
        grid = np.empty(0, np.int64) if tiled else np.asarray(prepared["image_grid_thw"], np.int64)[0]
        return ImageInputs(
            pixels,
            grid,
            len(pixels) * tiled if tiled else int(grid.prod()) // self._images.merge_size**2,
            hashlib.blake2b(encoded, digest_size=16).digest(),
            _thumbnail(image) if self.makes_thumbnails else b"",
        )

    def prepare_prompt(self, prompt: Prompt) -> tuple[SequenceImage, ...]:
        """Compute what the model reads of a prompt's images.

        Raises:
            RuntimeError: the prompt's ids do not have the tokens of these images.
        """
        if not prompt.images:
            return ()
        images = [self.prepare(each) for each in prompt.images]
        expected, found = sum(image.tokens for image in images), prompt.ids.count(self.token_id)
        if expected != found:
            raise RuntimeError(f"row {prompt.row} has {found} image tokens, and its images have {expected}")
        return tuple(map(SequenceImage, self._first_tokens(prompt.ids, images), images))

    @cached_property
    def text_of_image(self) -> str:
        """Return what the chat template writes for an image, which stands for it in prompts without a template."""
        mark = "x7"
        text = write_chat(
            with_image_parts([{"role": "user", "content": f"{mark}{IMAGE}{mark}"}]), self.tokenizer
        )
        return text.split(mark)[1]


def load_image_processor(run: RunConfig) -> ImageProcessor | None:
    """Load the processor of the actor's model; None if the model reads no images.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoProcessor, PreTrainedConfig  # imports torch

    model, data = run.actor.model, run.data
    try:
        kind = PreTrainedConfig.get_config_dict(model.path)[0].get("model_type")
    except (OSError, ValueError):  # the code that builds the model reports what is wrong
        return None
    if kind not in VISION_LANGUAGE:
        return None
    path, key = data.tokenizer or model.path, run.actor.key("model.path")
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        images, token = processor.image_processor, processor.image_token_id
        size = getattr(processor, "image_seq_length", None) or images.merge_size
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{key}: no processor of images could be read from {path}, for the model of {model.path}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}\n"
            "It needs a preprocessor_config.json beside the tokenizer, and the packages pillow and torchvision: "
            "pip install 'iiverl[vision]'"
        ) from error
    if not isinstance(size, int) or not isinstance(token, int):
        raise ConfigError(f"{key}: the processor of {path} does not say how images become tokens")
    _limit_pixels(processor, data)
    if processor.tokenizer.chat_template is None:
        processor.tokenizer.chat_template = processor.chat_template
    return ImageProcessor(
        processor, makes_thumbnails=bool(run.trainer.rollout_data_dir or run.trainer.validation_data_dir)
    )


def _limit_pixels(processor: Any, data: DataConfig) -> None:
    """Let images have from `data.min_pixels` to `data.max_pixels` pixels; tiles are of one size, so only their number changes."""
    images = processor.image_processor
    if hasattr(processor, "image_seq_length"):
        if data.max_pixels is not None:
            images.max_patches = max(1, data.max_pixels // (images.size.height * images.size.width))
        return
    limits = {"shortest_edge": data.min_pixels, "longest_edge": data.max_pixels}
    images.size = replace(images.size, **{name: n for name, n in limits.items() if n is not None})


def encoded_images(value: Any, folder: Path) -> list[bytes]:
    """Return the images in a value of the image column: none, one, or a list of them; see `encoded_image`.

    Raises:
        PromptError: one is missing, or is no image.
    """
    if value is None:
        return []
    images = value if isinstance(value, list | tuple) else [value]
    return [encoded_image(image, folder) for image in images]


def encoded_image(value: Any, folder: Path) -> bytes:
    """Return an image as it is encoded: bytes, a path, a base64 data URL, or a dict with `bytes`, `path`, `image` or `url`.

    A relative path is looked up from the working directory, then in `folder`.

    Raises:
        PromptError: it is none of these, or there is no such file.
    """
    match value:
        case bytes() | bytearray() | memoryview():
            return bytes(value)
        case str():
            return _from_text(value, folder)
        case Mapping():
            for name in ("bytes", "path", "image", "url"):
                if value.get(name) is not None:
                    return encoded_image(value[name], folder)
            raise PromptError("has an image without bytes and path")
        case _:
            raise PromptError(
                f"has an image of type {type(value).__name__}; use bytes, a path, a base64 data URL, or "
                "{bytes, path}, as datasets.Image stores it"
            )


def _from_text(text: str, folder: Path) -> bytes:
    if text.startswith("data:"):
        found = _DATA_URL.match(text)
        if found is None:
            raise PromptError(f"has an image as a data URL that is not base64: {text[:40]}…")
        try:
            return base64.b64decode(text[found.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise PromptError(f"has an image as a data URL with wrong base64: {error}") from error
    if text.startswith(("http://", "https://")):
        raise PromptError(
            f"has an image at {text}; download it, since images are not fetched during training"
        )
    path = Path(text.removeprefix("file://")).expanduser()
    path = path if path.exists() else folder / path
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptError(f"has an image that cannot be read: {text}: {error.strerror or error}") from error


def decode(encoded: bytes) -> "Image":
    """Decode an image to RGB; what is transparent becomes white."""
    from PIL import Image

    image = Image.open(BytesIO(encoded))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _thumbnail(image: "Image") -> bytes:
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def check_image(encoded: bytes) -> tuple[int, int]:
    """Decode an image to find faults, and return width and height in pixels.

    Raises:
        PromptError: it cannot be decoded.
    """
    from PIL import Image

    try:
        image = Image.open(BytesIO(encoded))
        size = image.size
        image.draft("RGB", (1, 1))  # a JPEG is decoded at a fraction of its size
        image.load()
    except Exception as error:  # the library raises anything for files that are cut off or forged
        raise PromptError(f"has an image that cannot be decoded: {error}") from error
    return size


def images_of(value: Any, parts: Sequence[Any], column: Any, folder: Path) -> tuple[bytes, ...]:
    """Return the images of a prompt in the order of their placeholders.

    `parts` are the values of its image parts (`as_prompt`), and `column` that of the image column, which has the images
    of parts without one and of placeholders `IMAGE` in texts.

    Raises:
        PromptError: an image is missing or cannot be read, or there are more or fewer placeholders than images.
    """
    listed = encoded_images(column, folder)
    inside = [part for part in parts if part is not None]
    if inside and listed:
        raise PromptError("has images in its chat and in the column of images; leave one of them out")
    images = [encoded_image(part, folder) for part in inside] or listed
    texts = [value] if isinstance(value, str) else [str(message.get("content") or "") for message in value]
    placeholders = sum(text.count(IMAGE) for text in texts)
    if (images or parts or column is not None) and placeholders != len(images):
        raise PromptError(
            f"has {_number(placeholders, f'placeholder {IMAGE}', f'placeholders {IMAGE}')} and "
            f"{_number(len(images), 'image')}; write {IMAGE} once for each, where the model is to see it"
        )
    return tuple(images)


def with_image_parts(messages: Messages) -> Messages:
    """Write messages as chat templates take them: texts with `IMAGE` become lists of parts."""
    return [
        {**message, "content": _parts(message["content"])} if IMAGE in message["content"] else message
        for message in messages
    ]


def _parts(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
