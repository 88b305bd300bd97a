"""Images in several turns: environments, tools and agents show them, and their tokens are where the sequence says."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from iiverl_core.config import build, run_config
from iiverl_core.data import ImageProcessor
from iiverl_core.data.chat import PromptError
from iiverl_core.message_parts import data_url, plain_content
from iiverl_core.rollout import RolloutRequest
from iiverl_core.rollout.agents import AgentRollouter, RolloutSession, agent_row
from iiverl_core.rollout.engine import Completion, GenerationRequest
from iiverl_core.rollout.openai_messages import APIError, ChatBody, parse
from iiverl_core.rollout.tools import ToolRollouter
from iiverl_core.rollout.turns import Conversation, TurnTemplate
from iiverl_core.samples import Prompt, SampleId, SequenceImage
from vision_models import SIDE, TEMPLATE, png, save_processor, vision_config

RED, BLUE = png("red"), png("blue", (3 * SIDE, SIDE))
ID = SampleId("train", 1, 0, 0)
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    """A processor of images, whose tokenizer has a token per byte."""
    path = tmp_path_factory.mktemp("sees")
    vision_config("qwen2_5_vl").save_pretrained(path)
    save_processor(path)
    return ImageProcessor(AutoProcessor.from_pretrained(path))


class Script:
    """A policy that says what it is given; a `Generate` that keeps what it is asked."""

    weights_version = 7

    def __init__(self, processor: ImageProcessor, *texts: str) -> None:
        self._tokenizer, self._texts = processor.tokenizer, list(texts)
        self.asked: list[tuple[list[int], list[SequenceImage]]] = []

    async def __call__(
        self, prompt_ids: Sequence[int], *, max_tokens: int | None = None, images: Any = None
    ) -> Completion:
        self.asked.append((list(prompt_ids), list(images)))
        return said(self._tokenizer, self._texts.pop(0))


def said(tokenizer: Any, text: str) -> Completion:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    zeros = np.zeros(len(ids), dtype=np.float32)
    return Completion(
        GenerationRequest(ID, ()), ids, zeros, "length", 7
    )  # the template ends it, by a semicolon


def read(processor: ImageProcessor, text: str, *images: bytes) -> list[int]:
    """The tokens of a text, in which `SEEN` stands for an image, by the processor alone."""
    from iiverl_core.data.images import decode

    decoded = [decode(image) for image in images]
    return processor.processor(text=[text], images=decoded or None)["input_ids"][0]  # type: ignore[operator]


def check_places(processor: ImageProcessor, ids: Sequence[int], images: Sequence[SequenceImage]) -> None:
    """Check that each image begins after the token before it, and is followed by the one after it."""
    start, end = processor.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    for at, image in images:
        assert ids[at - 1] == start and ids[at + image.tokens] == end
        assert set(ids[at : at + image.tokens]) == {processor.token_id}


def test_an_image_token_that_is_sampled_or_spelled_is_no_image(processor: ImageProcessor) -> None:
    template = TurnTemplate(processor.tokenizer, images=processor)
    red, blue = processor.prepare(RED), processor.prepare(BLUE)
    parts = [{"type": "text", "text": "at <|image_pad|>"}, {"type": "image"}]
    talk = Conversation(template, [{"role": "user", "content": parts}], images=[red])
    spelled = processor.tokenizer("<", add_special_tokens=False)["input_ids"]
    assert talk.ids.count(processor.token_id) == red.tokens and talk.ids.count(spelled[0]) == 1
    talk.add_response(said(processor.tokenizer, "so <|image_pad|>"))
    assert talk.ids.count(processor.token_id) == red.tokens + 1
    assert talk.add_messages([{"role": "user", "content": [{"type": "image"}]}], [blue])
    talk.add_response(said(processor.tokenizer, "yes"))
    (sequence,) = talk.sequences
    assert [image for _, image in sequence.images] == [red, blue] == list(talk.seen)
    check_places(processor, sequence.token_ids.tolist(), sequence.images)
    assert talk.messages[0]["content"] == "at <|image_pad|><image>"
    assert talk.messages[2]["content"] == "<image>"
    with pytest.raises(PromptError, match="1 image, and the chat template writes 0"):
        talk.add_messages([{"role": "user", "content": "none"}], [red])


def test_a_rewritten_conversation_has_its_images_again(processor: ImageProcessor) -> None:
    rewriting = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'][:4 * loop.revindex] }}")
    tokenizer = processor.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, rewriting
    try:
        template = TurnTemplate(tokenizer, images=processor)
        red, blue = processor.prepare(RED), processor.prepare(BLUE)
        talk = Conversation(template, [{"role": "user", "content": [{"type": "image"}]}], images=[red])
        talk.add_response(said(tokenizer, "a long <|image_pad|>"))
        assert not talk.add_messages([{"role": "user", "content": [{"type": "image"}]}], [blue])
        talk.add_response(said(tokenizer, "b"))
        first, second = talk.sequences
    finally:
        tokenizer.chat_template = kept
    assert [image for _, image in first.images] == [red]
    assert [image for _, image in second.images] == [red, blue]
    check_places(processor, second.token_ids.tolist(), second.images)


TOOLS = '''
from PIL import Image

def look(colour: str):
    """Show a colour."""
    if colour == "gone":
        return {"type": "image", "image": "gone.png"}
    return ["see ", Image.new("RGB", (16, 8), colour), "!"]
'''


def test_tools_return_images(processor: ImageProcessor, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(TOOLS)
    tools = {"path": str(tmp_path / "tools.py"), "names": ["look"]}
    rollout = {
        "name": "hf",
        "agent": {"default_agent_loop": "tools"},
        "multi_turn": {"tools": tools, "max_assistant_turns": 4},
    }
    data = {"max_prompt_length": 400, "max_response_length": 900}
    trainer = {"default_local_dir": str(tmp_path)}
    run = run_config(build({"actor_rollout_ref": {"rollout": rollout}, "data": data, "trainer": trainer}))
    calls = [
        f'<tool_call>{{"name": "look", "arguments": {{"colour": "{colour}"}}}}</tool_call>'
        for colour in ("red", "gone")
    ]
    chat = ({"role": "user", "content": "<image>What?"},)
    ids = read(processor, f"u:{SEEN}What?;a:", BLUE)
    prompt = Prompt(0, tuple(ids), "", chat=chat, images=(BLUE,))
    request = RolloutRequest(ID, prompt, 1, processor.prepare_prompt(prompt))
    results = {}
    for reads in (True, False):
        asked = request if reads else RolloutRequest(ID, Prompt(0, (1,), "", chat=chat), 1)
        rollouter = ToolRollouter(run, processor.tokenizer, processor if reads else None)
        script = Script(processor, calls[0] + calls[1], "fine")
        try:
            done = asyncio.run(rollouter.rollout(asked, script))
        finally:
            rollouter.close()
        assert done.outcome is None
        results[reads] = [each["content"] for each in done.messages or () if each["role"] == "tool"]
        if reads:
            (sequence,) = done.sequences
            assert [image.tokens for _, image in sequence.images] == [3, 2]
            check_places(processor, sequence.token_ids.tolist(), sequence.images)
            assert script.asked[1][1] == list(sequence.images) and len(done.images) == 2
            assert done.counts["tool_errors"] == 1
    assert results[True] == ["see <image>!", results[True][1]]
    assert results[True][1].startswith("Error: the result has an image that cannot be read: gone.png")
    assert results[False] == ["see [image]!", "[image]"]


def body(messages: Sequence[Any]) -> Any:
    return parse(ChatBody, json.dumps({"messages": list(messages)}).encode()).request()


def image_part(image: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def test_an_agent_sends_images_as_in_the_api_and_continues_its_conversation(
    processor: ImageProcessor, tmp_path: Path
) -> None:
    prompt = Prompt(0, (1,), "", chat=({"role": "user", "content": "<image>What?"},), images=(RED,))
    messages = agent_row(prompt, 3)["prompt"]
    assert json.loads(json.dumps(messages))[0]["content"][0] == image_part(RED)
    lengths = {"max_prompt_length": 200, "max_response_length": 100}
    run = run_config(
        build(
            {
                "actor_rollout_ref": {
                    "rollout": {
                        "name": "hf",
                        "agent": {"default_agent_loop": "agent"},
                        "multi_turn": {"agent": {"command": "true"}},
                    }
                },
                "data": lengths,
                "trainer": {"default_local_dir": str(tmp_path)},
            }
        )
    )

    async def talk() -> None:
        script = Script(processor, "one", "two", "three")
        rollouter = AgentRollouter(run, processor.tokenizer, processor)
        session = RolloutSession(rollouter._policy, script)
        asked = [*messages]
        for image in (BLUE, RED):
            (answer,) = await session.chat(body(asked))
            asked += [answer.message, {"role": "user", "content": ["so", image_part(image)]}]
        (answer,) = await session.chat(body(asked))
        done = session.tokens(RolloutRequest(ID, prompt, 1), None)
        (sequence,) = done.sequences  # each request continued the one before
        assert [image.tokens for _, image in sequence.images] == [2, 3, 2] and len(done.turns) == 3
        check_places(processor, sequence.token_ids.tolist(), sequence.images)
        text = f"u:{SEEN}What?;a:one;u:so{SEEN};a:two;u:so{SEEN};a:three"
        assert sequence.token_ids.tolist() == read(processor, text, RED, BLUE, RED)
        assert (done.messages or ())[2]["content"] == "so<image>"
        for content, problem in (
            ([image_part(b"text")], "cannot be read"),
            ([{"type": "image_url", "image_url": {"url": "cat.png"}}], "not a data URL"),
            ([{"type": "video_url", "video_url": {"url": "x"}}], "a part of type 'video_url'"),
        ):
            with pytest.raises(APIError, match=problem):
                await session.chat(body([{"role": "user", "content": content}]))
        blind = AgentRollouter(run, processor.tokenizer)
        with pytest.raises(APIError, match="reads texts only"):
            await RolloutSession(blind._policy, script).chat(body(messages))

    asyncio.run(talk())


@pytest.mark.parametrize(
    "given", [[3], [{"type": "audio"}], [{"type": "image", "image": 3}], [{"type": "text"}]]
)
def test_other_parts_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"has a part of|has an image of type int"):
        plain_content(given)
