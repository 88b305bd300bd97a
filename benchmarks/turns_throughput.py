"""What slow tools cost: rollouts of several turns whose tools take 50 ms, and the same with tools of 0 ms, alternating.

    python benchmarks/turns_throughput.py [--rollouts 64] [--turns 4] [--tokens 48] [--tool-ms 50] [--rounds 5]
                                          [--in-lockstep] [--json FILE]

All rollouts run at once on one engine `hf` with a random model, each with its calls in processes of their own, as in a
run. A random model makes no calls, so the benchmark appends one to each response; the model reads it, and its result, with
the next prompt. Responses have between a half and one and a half times `--tokens` tokens, which depend on the rollout
and the turn alone, so both kinds of rounds do the same work. A round of each warms up and is left out.

`throughput` is the number of generated tokens per second. `busy` is the share of the wall time in which the engine computes, and
`batch` the mean number of responses that it decodes at a time. With `--in-lockstep` the engine waits for all rollouts before
each step, as with `trainer.deterministic: true`.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.rollout import (
    Completion,
    Generate,
    Rollouter,
    RolloutRequest,
    RolloutTokens,
    make_engine,
    make_rollouter,
    run_rollouts,
    sampling_params,
)
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.samples import Prompt, SampleId

TOOL = '''
import time


def wait(ms: int) -> str:
    """Wait."""
    time.sleep(ms / 1000)
    return "done"
'''
LETTERS = [
    chr(0x4E00 + i) for i in range(2000)
]  # a response ends by itself with a chance of 1 in 2000 per token
TURNS = (
    "{% for tool in tools or [] %}<tools>{{ tool['function']['name'] }}{% endfor %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(folder: Path, hidden: int, layers: int) -> Any:
    """Save a random Qwen2 with a tokenizer of one token per character, and return both."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    alphabet = [*(chr(i) for i in range(32, 127)), *LETTERS]
    characters = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(alphabet)}, merges=[]))
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(["<end>", "<user>", "<assistant>", "<tool>", "<tools>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<end>", pad_token="<end>", chat_template=TURNS
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, tokenizer


def run_of(folder: Path, given: argparse.Namespace) -> RunConfig:
    """Configure the run whose engine and rollouter are measured."""
    (folder / "tool.py").write_text(TOOL)
    rollout = {
        "name": "hf",
        "dtype": "float32",
        "agent": {"default_agent_loop": "tools"},
        "multi_turn": {
            "max_assistant_turns": given.turns + 1,
            "tools": {"path": str(folder / "tool.py"), "names": ["wait"], "workers": given.rollouts},
        },
    }
    return run_config(
        build(
            {
                "actor_rollout_ref": {"model": {"path": str(folder)}, "rollout": rollout},
                "data": {"max_prompt_length": 64, "max_response_length": 4000},
                "trainer": {"default_local_dir": str(folder / "run")},
            }
        )
    )


class Calling:
    """A `Rollouter` that has `inner` make rollouts with a model that calls the tool at the end of each response but the last."""

    concurrency: int | None = None

    def __init__(self, inner: Rollouter, tokenizer: Any, given: argparse.Namespace, tool_ms: int) -> None:
        call = f'<tool_call>{{"name": "wait", "arguments": {{"ms": {tool_ms:3d}}}}}</tool_call>'
        self._inner, self._turns, self._tokens = inner, given.turns, given.tokens
        self._call = np.array(tokenizer(call, add_special_tokens=False)["input_ids"], dtype=np.int64)
        self._end = tokenizer.eos_token_id
        self.generated = 0

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`."""
        return await self._inner.rollout(request, _Appending(self, request, generate))

    def close(self) -> None:
        """See `Rollouter.close`."""

    def appended(self, response: Completion, turn: int) -> Completion:
        """End a response with a call, if it is not the last."""
        self.generated += len(response.token_ids)
        if turn == self._turns:
            return response
        ids = response.token_ids[response.token_ids != self._end]
        ids = np.concatenate([ids, self._call, [self._end]])
        return replace(
            response, token_ids=ids, log_probs=np.zeros(len(ids), np.float32), finish_reason="stop"
        )

    def length(self, request: RolloutRequest, turn: int) -> int:
        """Return the number of tokens of a response."""
        chance = random.Random(f"{request.id} {turn}").random()
        return round(self._tokens * (0.5 + chance))


class _Appending:
    """A `Generate` whose responses end with a call."""

    def __init__(self, rollouter: Calling, request: RolloutRequest, generate: Generate) -> None:
        self._rollouter, self._request, self._generate = rollouter, request, generate
        self._turn = 0
        self.weights_version = generate.weights_version

    async def __call__(self, prompt_ids: Sequence[int], *, max_tokens: int | None = None) -> Completion:
        self._turn += 1
        response = await self._generate(
            prompt_ids, max_tokens=self._rollouter.length(self._request, self._turn)
        )
        return self._rollouter.appended(response, self._turn)


@dataclass
class Engine:
    """The engine `hf`, and what it has done: seconds, steps, and responses that were decoded in these."""

    engine: HFEngine
    seconds: float = 0.0
    steps: int = 0
    decoded: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> list[Completion]:
        """See `RolloutEngine.step`."""
        began = time.perf_counter()
        self.decoded += self.engine.pending
        done = self.engine.step()
        self.seconds += time.perf_counter() - began
        self.steps += 1
        return done


def measured(
    given: argparse.Namespace, run: RunConfig, engine: HFEngine, rollouter: Calling
) -> dict[str, float]:
    """Make all rollouts once."""
    counting = Engine(engine)
    requests = [RolloutRequest(SampleId("train", 1, i, 0), _prompt(i), seed=i) for i in range(given.rollouts)]
    rollouter.generated = 0
    began = time.perf_counter()
    for done in run_rollouts(
        counting,  # pyright: ignore[reportArgumentType]
        rollouter,
        requests,
        sampling_params(run, "train"),
        in_lockstep=given.in_lockstep,
    ):
        assert done.counts["tool_calls"] == given.turns - 1 and done.counts["tool_errors"] == 0, done.messages
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "tokens": rollouter.generated,
        "throughput": rollouter.generated / seconds,
        "busy": counting.seconds / seconds,
        "batch": counting.decoded / counting.steps,
    }


def _prompt(i: int) -> Prompt:
    text = LETTERS[i]
    return Prompt(i, (0,), text, chat=({"role": "user", "content": text},), source="benchmark")


def rounds(given: argparse.Namespace) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Alternate between the two kinds of tools; yield round, milliseconds and what was measured."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, tokenizer = make_model(folder, given.hidden, given.layers)
        run = run_of(folder, given)
        engine = make_engine(run, "cpu")
        assert isinstance(engine, HFEngine)
        engine.update_weights(model.named_parameters(), 0)
        rollouter = make_rollouter(run, tokenizer)
        try:
            for i in range(given.rounds + 1):
                kinds = (0, given.tool_ms) if i % 2 else (given.tool_ms, 0)
                for tool_ms in kinds:
                    calling = Calling(rollouter, tokenizer, given, tool_ms)
                    yield i, tool_ms, measured(given, run, engine, calling)
        finally:
            rollouter.close()


def main() -> None:
    """Parse the arguments, measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {
        "rollouts": 64,
        "turns": 4,
        "tokens": 48,
        "tool-ms": 50,
        "rounds": 5,
        "hidden": 256,
        "layers": 4,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--in-lockstep", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {0: [], given.tool_ms: []}
    for i, tool_ms, result in rounds(given):
        if i:
            found[tool_ms].append(result)
    print(f"{'tools':>8}{'tokens':>9}{'seconds':>9}{'tokens/s':>10}{'busy':>7}{'batch':>7}")
    for tool_ms, results in found.items():
        middle = {key: statistics.median(each[key] for each in results) for key in results[0]}
        print(
            f"{tool_ms:5d} ms{middle['tokens']:9.0f}{middle['seconds']:9.2f}{middle['throughput']:10.0f}"
            f"{middle['busy']:7.0%}{middle['batch']:7.1f}"
        )
    ratios = [
        slow["throughput"] / fast["throughput"]
        for fast, slow in zip(found[0], found[given.tool_ms], strict=True)
    ]
    fast, slow = (statistics.median(each["throughput"] for each in results) for results in found.values())
    print(f"throughput with {given.tool_ms} ms / with 0 ms: {slow / fast:.3f}", end="")
    print(f", in pairs from {min(ratios):.3f} to {max(ratios):.3f}")
    if given.json:
        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        options = {key: value for key, value in vars(given).items() if key != "json"}
        content = {
            "options": options,
            "machine": machine,
            "ratio": slow / fast,
            "ratios_of_pairs": ratios,
            "rounds": {f"{tool_ms} ms": results for tool_ms, results in found.items()},
        }
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
