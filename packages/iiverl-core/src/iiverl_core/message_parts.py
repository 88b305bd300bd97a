"""Contents of messages that user code returns: texts, or parts with images.

Processes of user code import this module, so it imports nothing that they may not have.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

TEXT_PARTS = (None, "text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
_MAGIC = {"jpeg": b"\xff\xd8\xff", "gif": b"GIF8", "webp": b"RIFF", "bmp": b"BM"}
_FIELDS = ("image_url", "image", "url", "path", "bytes")


def is_image(value: Any) -> bool:
    """Return whether a value is an image object, of Pillow."""
    return any(
        each.__module__.startswith("PIL.") and each.__name__ == "Image" for each in type(value).__mro__
    )


def has_image(content: Any) -> bool:
    """Return whether content is an image, or a list of parts with one."""
    parts = content if isinstance(content, list | tuple) else [content]
    return any(is_image(part) or _kind(part) in IMAGE_PARTS for part in parts)


def plain_content(content: Any) -> str | list[dict[str, Any]]:
    """Return content as a text, or as a list of parts `{type: text, text}` and `{type: image, image}`.

    A part is a text, an image of Pillow, or an object as in the OpenAI API. An image is a path or a data URL.

    Raises:
        ValueError: a part is something else; the message completes a sentence that begins with it.
    """
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in (content if isinstance(content, list | tuple) else [content])]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if is_image(part):
        return {"type": "image", "image": _encoded(part)}
    kind = _kind(part)
    if kind in IMAGE_PARTS:
        given = next((part[name] for name in _FIELDS if part.get(name) is not None), None)
        return {"type": "image", "image": _encoded(given.get("url") if isinstance(given, Mapping) else given)}
    if isinstance(part, Mapping) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    what = f"of type {kind!r}" if isinstance(kind, str) else f"of {type(part).__name__}"
    raise ValueError(f"has a part {what}; a part is a text or an image")


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _encoded(image: Any) -> str:
    """Return an image as a path or a data URL."""
    if is_image(image):
        file = BytesIO()
        image.save(file, "PNG")
        image = file.getvalue()
    if isinstance(image, bytes | bytearray | memoryview):
        return data_url(image)
    if isinstance(image, str) and image:
        return image
    raise ValueError(
        f"has an image of type {type(image).__name__}; use bytes, a path, a data URL or a Pillow image"
    )


def data_url(encoded: bytes | bytearray | memoryview) -> str:
    """Write an encoded image as a data URL, of the type that its first bytes say."""
    start = bytes(encoded[:12])
    kind = next((name for name, magic in _MAGIC.items() if start.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def text_of(content: str | Sequence[Mapping[str, Any]], image: str) -> str:
    """Return plain content as a text, in which `image` stands for an image."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else image for part in content)
