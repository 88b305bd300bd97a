"""An engine without a model, a tokenizer of one token per character, and configurations of environments."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.rollout import Completion, GenerationRequest, RolloutRequest, SamplingParams
from iiverl_core.samples import Prompt, SampleId

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;'\"!?-<>()[]{}/_\nABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character, and one for each mark of a chat template that never rewrites history."""
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    letters.decoder = decoders.Fuse()
    letters.add_special_tokens(["<end>", "<user>", "<assistant>", "<system>", "<tool>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE
    )


class ScriptedEngine:
    """Writes random words: each response depends on its request's seed, member and prompt alone. A `RolloutEngine`.

    A step writes a token of every response. Words have up to `longest` letters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, longest: int = 4) -> None:
        self.weights_version = 3
        self.steps = 0
        self.tokenizer = tokenizer
        self._end, self._longest = tokenizer.eos_token_id, longest
        self._pending: dict[GenerationRequest, tuple[list[int], bool, int]] = {}

    @property
    def pending(self) -> int:
        return len(self._pending)

    def submit(self, request: GenerationRequest, params: SamplingParams) -> None:
        rng = np.random.default_rng([request.seed, request.id.member, *request.prompt_ids])
        word = rng.integers(0, 26, int(rng.integers(1, self._longest + 1))).tolist()
        ids = [*word, self._end][: params.max_tokens]
        self._pending[request] = ids, ids[-1] != self._end, 0

    def step(self) -> list[Completion]:
        self.steps += 1
        done = []
        for request, (ids, cut, written) in list(self._pending.items()):
            if written + 1 < len(ids):
                self._pending[request] = ids, cut, written + 1
                continue
            del self._pending[request]
            log_probs = np.array([-(1 + id) / 8 for id in ids], dtype=np.float32)
            reason = "length" if cut else "stop"
            done.append(
                Completion(request, np.array(ids, dtype=np.int64), log_probs, reason, self.weights_version)
            )
        return done

    def abort(self, requests: Collection[GenerationRequest]) -> None:
        for request in list(requests):
            self._pending.pop(request, None)

    def update_weights(self, weights: Iterable[Any], version: int, *, verify: bool = True) -> None:
        self.weights_version = version

    def sleep(self, *, discard_weights: bool = False) -> None:
        pass

    def release_cache(self) -> None:
        pass

    def close(self) -> None:
        pass


def environment_run(path: Path, folder: Path, *, responses: int = 64, **multi_turn: Any) -> RunConfig:
    """A run with the environment in a file; keys of the environment's section and of `multi_turn`."""
    limits = {name: multi_turn.pop(name) for name in list(multi_turn) if name.startswith("max_")}
    rollout = {
        "name": "hf",
        "agent": {"default_agent_loop": "environment"},
        "multi_turn": {**limits, "environment": {"path": str(path), **multi_turn}},
    }
    return run_config(
        build(
            {
                "actor_rollout_ref": {"rollout": rollout},
                "data": {"max_prompt_length": 64, "max_response_length": responses},
                "trainer": {"default_local_dir": str(folder)},
            }
        )
    )


def requests_of(
    tokenizer: PreTrainedTokenizerFast, infos: Iterable[Any], text: str = "say"
) -> list[RolloutRequest]:
    """A request per `extra_info`, each of a group of its own with the same short prompt."""
    chat = ({"role": "user", "content": text},)
    ids = tokenizer(f"<user>{text}<end><assistant>", add_special_tokens=False)["input_ids"]
    return [
        RolloutRequest(
            SampleId("train", 1, group, 0),
            Prompt(group, tuple(ids), text, "test", "truth", {"extra_info": info}, chat, "rows", group),
            seed=100 + group,
        )
        for group, info in enumerate(infos)
    ]
