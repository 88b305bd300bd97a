"""Models of several architectures, small enough to be made on the spot, and their teacher-forced log-probs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.core_model_loading import revert_weight_conversion

from iiverl_core.rollout import Completion, GenerationRequest, SamplingParams
from iiverl_core.rollout.hf import HFEngine
from rollout.responses import ask

if TYPE_CHECKING:
    from iiverl_core.rollout.vllm import VLLMEngine

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 258,
}
ARCHITECTURES = {
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 8, "num_key_value_heads": 4},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    # Heads as narrow as vLLM on a CPU can do.
    "qwen2-wide": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "llama-wide-tied": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {
        "hidden_size": 64,
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {"n_layer": 2, "n_head": 4},
}


@pytest.fixture(scope="session")
def make_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """Make a random fp32 model of an architecture, and a folder with its configuration, weights and tokenizer."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            torch.set_num_threads(1)
            own = {"gpt2", "bloom"}
            sizes = {
                k: v
                for k, v in SIZES.items()
                if name not in own or not k.startswith(("num_", "inter", "head"))
            }
            config = AutoConfig.for_model(name.split("-")[0], **(sizes | ARCHITECTURES[name]))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
                for weight in model.parameters():  # flat logits would hide mistakes
                    weight.data.mul_(4 if weight.dim() > 1 else 1)
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_engine_of() -> Callable[..., HFEngine]:
    """Make an fp32 engine on the CPU with a model's weights."""

    def make(path: Path, model: PreTrainedModel, version: int = 0, **options) -> HFEngine:
        engine = HFEngine(str(path), **({"dtype": torch.float32, "device": "cpu"} | options))
        weights = revert_weight_conversion(model, dict(model.named_parameters()))  # names as in a checkpoint
        engine.update_weights(weights.items(), version)
        return engine

    return make


@pytest.fixture(scope="session")
def prompts() -> list[GenerationRequest]:
    """Five prompts of mixed lengths, one of them a single token."""
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 1, 12, 7, 12)
    return [
        ask(
            group=10 + i,
            prompt_ids=torch.randint(0, 256, (length,), generator=generator).tolist(),
            seed=100 + i,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def teacher_forced() -> Callable[..., torch.Tensor]:
    """Log-probs of a response's tokens from one full forward pass, warped by transformers' own warpers."""

    @torch.no_grad()
    def log_probs(
        model: PreTrainedModel, prompt: Sequence[int], done: Completion, params: SamplingParams
    ) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *done.token_ids.tolist()]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logits = TemperatureLogitsWarper(float(params.temperature))(ids, logits)
        logits = TopKLogitsWarper(params.top_k)(ids, logits) if params.top_k > 0 else logits
        logits = TopPLogitsWarper(params.top_p)(ids, logits) if params.top_p < 1 else logits
        return logits.log_softmax(-1)[torch.arange(len(logits)), torch.from_numpy(done.token_ids)]

    return log_probs


VLLM_ARGUMENTS = {
    "enforce_eager": True,
    "load_format": "dummy",
    "max_model_len": 128,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 2**25,
    "block_size": 32,  # so that short prompts are shared too
    "disable_log_stats": True,
}


@pytest.fixture(scope="session")
def vllm_engines() -> Iterator[list["VLLMEngine"]]:
    """Hold the engines in this process until all tests have run: they share vLLM's groups, so they end together."""
    engines: list[VLLMEngine] = []
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def make_vllm_of(make_model, vllm_engines) -> Callable[..., "VLLMEngine"]:
    """Start vLLM with a model of `make_model`, once for all tests, on the CPU; still without weights."""
    from iiverl_core.rollout.vllm import VLLMEngine
    from iiverl_core.rollout.vllm.arguments import FIXED

    started: dict[tuple[str, str], VLLMEngine] = {}

    def make(name: str, dtype: str = "float32") -> VLLMEngine:
        if (name, dtype) not in started:
            arguments = {"model": str(make_model(name)[0]), **VLLM_ARGUMENTS, **FIXED, "dtype": dtype}
            # One of those that tests share reports every token, the others the whole response.
            interruptible = name == "llama-wide-tied"
            started[name, dtype] = VLLMEngine(arguments, bucket_bytes=2**14, interruptible=interruptible)
            vllm_engines.append(started[name, dtype])
        return started[name, dtype]

    return make
