"""What every part starts from: a random model made on the spot, sequences, a configuration, a clock."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.registry import BACKENDS
from iiverl_core.samples import TokenSequence

GIB = 2**30
TOLERANCE = 0.03  # of the largest value: a few units of bf16's 8 bits, which add up over layers
PAD, END = 0, 1
FIRST = 2  # token ids from here on are no special ones

Numbers: TypeAlias = dict[str, float]
"""What a part measured, by name with unit."""


class NotPossibleError(Exception):
    """A part cannot run here, and nothing is wrong with that; the message says why."""


@dataclass(frozen=True)
class Size:
    """A model's shape, and the sequences that suit it: `tokens` to a micro-batch at most, lengths in tokens."""

    shape: Mapping[str, Any]
    sequences: int
    longest_prompt: int
    median_response: int
    longest_response: int
    tokens: int
    generated: int
    """Tokens of each response in the measurement of generation."""

    def config(self) -> Qwen2Config:
        """Give the model's configuration. Weights are wider than usual: flat logits would hide a mismatch."""
        return Qwen2Config(
            **self.shape,
            max_position_embeddings=4096,
            initializer_range=0.05,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )

    def needed_bytes(self) -> int:
        """Estimate the memory that training needs.

        Weights, gradients and AdamW's two moments in fp32, and six times the logits of a full micro-batch in fp32.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return 16 * parameters + 6 * 4 * self.tokens * self.shape["vocab_size"]


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }


# Heads of the tiny model are 32 wide, the least that vLLM can do on a CPU. The others are Qwen2.5-0.5B and -1.5B.
SIZES = {
    "tiny": Size(_qwen(128, 256, 2, 4, 512), 16, 32, 48, 160, 512, 32),
    "0.5b": Size(_qwen(896, 4864, 24, 14, 151936), 64, 384, 400, 2048, 8192, 256),
    "1.5b": Size(_qwen(1536, 8960, 28, 12, 151936), 64, 384, 400, 2048, 8192, 256),
}


@dataclass(frozen=True)
class Setting:
    """Where a part runs: the device, the model's size and its folder, and how often to measure."""

    device: torch.device
    size: Size
    model: Path
    repeats: int

    def configure(
        self,
        *,
        backend: str = "fsdp",
        packed: bool = True,
        offload: bool = False,
        engine: str = "hf",
        model: Path | None = None,
        lora_rank: int = 0,
        compile_blocks: bool = False,
    ) -> RunConfig:
        """Make a run's configuration, one with all roles: defaults but for what is said here; `model` is everyone's.

        Raises:
            NotPossibleError: the backend is not installed.
        """
        if missing := BACKENDS[backend].missing():
            raise NotPossibleError(missing)
        path = str(model or self.model)
        offloaded = {"param_offload": offload, "optimizer_offload": offload}
        parallel = {"fsdp_config": {**offloaded, "compile_blocks": compile_blocks}}
        if backend == "megatron":
            parallel = {**offloaded, "megatron": {"tensor_model_parallel_size": 1}}
        section = {"path": path, "use_remove_padding": packed}
        actor_model = {**section, **({"lora_rank": lora_rank, "lora_alpha": lora_rank} if lora_rank else {})}
        batching = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": self.size.tokens}
        return run_config(
            build(
                {
                    "data": {
                        "max_prompt_length": self.size.longest_prompt,
                        "max_response_length": self.size.longest_response,
                    },
                    "algorithm": {"adv_estimator": "gae", "use_kl_in_reward": True},
                    "actor_rollout_ref": {
                        "model": actor_model,
                        "actor": {**parallel, **batching},
                        "rollout": {"name": engine, "tensor_model_parallel_size": 1},
                    },
                    "critic": {"model": section},
                    "reward_model": {"enable": True, "model": {**section, "input_tokenizer": path}},
                    "trainer": {"n_gpus_per_node": 1, "runtime": "local"},
                },
                backend,
            )
        )

    def sequences(self) -> list[TokenSequence]:
        """Draw sequences whose responses have log-normal lengths, always the same."""
        rng = np.random.default_rng(0)
        size, count = self.size, self.size.sequences
        prompts = rng.integers(size.longest_prompt // 8, size.longest_prompt, count)
        drawn = rng.lognormal(np.log(size.median_response), 0.6, count)
        responses = drawn.clip(1, size.longest_response).astype(int)
        vocabulary = size.shape["vocab_size"]
        return [
            TokenSequence.single_turn(
                rng.integers(FIRST, vocabulary, p),
                rng.integers(FIRST, vocabulary, r),
                np.zeros(r, np.float32),
            )
            for p, r in zip(prompts, responses, strict=True)
        ]

    def seconds(
        self, action: Callable[[], object], *, warm_up: bool = True, times: int | None = None
    ) -> float:
        """Measure an action, `times` over or as often as the setting says; give the median in seconds."""
        if warm_up:
            action()
        measured = []
        for _ in range(times or self.repeats):
            self.synchronize()
            started = time.perf_counter()
            action()
            self.synchronize()
            measured.append(time.perf_counter() - started)
        return statistics.median(measured)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> Numbers:
        """Give the most memory that torch had allocated on the device so far; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {"peak GiB": torch.cuda.max_memory_allocated() / GIB}

    def forget_peak(self) -> None:
        """Let `peak` begin again with what is allocated now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def make_model(setting: Setting) -> Numbers:
    """Save a random model in bf16, and a tokenizer that knows the end of a sentence and little else."""
    torch.manual_seed(0)
    with setting.device:
        model = AutoModelForCausalLM.from_config(setting.size.config(), dtype=torch.bfloat16)
    model.save_pretrained(setting.model)
    letters = Tokenizer(models.BPE(vocab={"<pad>": PAD, "<end>": END, "a": FIRST}, merges=[]))
    letters.add_special_tokens(["<pad>", "<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(setting.model)
    return {"parameters M": sum(parameter.numel() for parameter in model.parameters()) / 1e6}


def inputs_of(example: Path) -> Any:
    """Import the module of an example that makes its model and data."""
    spec = spec_from_file_location(f"inputs_of_{example.name}", example / "make_inputs.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """Make this process a group of one."""
    kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    with TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        dist.init_process_group(kind, init_method=meeting, rank=0, world_size=1)
        yield
        if dist.is_initialized():  # vLLM takes it down with its engine
            dist.destroy_process_group()
