"""Images that environments, tools and agents send to the policy."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iiverl_core.data.chat import PromptError
from iiverl_core.data.images import ImageProcessor, encoded_image, with_image_parts
from iiverl_core.rollout.rollouter import RolloutRequest
from iiverl_core.rollout.turns import Message
from iiverl_core.samples import ImageInputs


class TurnImages:
    """Prepares the images in contents of messages, as `message_parts.plain_content` returns them, for a policy."""

    def __init__(self, processor: ImageProcessor | None) -> None:
        """Use the policy's `processor`; None if it reads texts only."""
        self._processor = processor

    @property
    def are_read(self) -> bool:
        """Whether the policy reads images."""
        return self._processor is not None

    async def read(self, content: Any) -> tuple[Any, list[ImageInputs]]:
        """Return content as chat templates take it, and its images.

        Images are prepared in a thread, since a large one takes as long as the engine does for several tokens.

        Raises:
            PromptError: the policy reads texts only, or an image is missing or cannot be read.
        """
        if not isinstance(content, list):
            return content, []
        if self._processor is None:
            raise PromptError("has an image, and the model reads texts only")
        parts, images = [], []
        for part in content:
            if part["type"] == "image":
                encoded = encoded_image(part["image"], Path())
                images.append(await asyncio.to_thread(self._processor.prepare, encoded))
                part = {"type": "image"}
            parts.append(part)
        return parts, images

    async def read_messages(self, messages: Sequence[Message]) -> tuple[list[Message], list[ImageInputs]]:
        """Return messages as chat templates take them, and their images; raises as `read`."""
        shown, images = [], []
        for message in messages:
            content, own = await self.read(message["content"])
            shown.append({**message, "content": content})
            images += own
        return shown, images


def prompt_messages(request: RolloutRequest) -> list[Mapping[str, Any]]:
    """Return the messages of a dataset's prompt as chat templates take them."""
    messages = [dict(message) for message in request.prompt.chat or ()]
    return list(with_image_parts(messages)) if request.images else list(messages)
