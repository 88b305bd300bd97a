"""Time of a GRPO update by layout of its sequences: padded rows, packed into one row, or packed with shared prompts.

Usage: layouts.py [--prompts 8] [--group 8] [--prompt 32] [--new 128] [--rounds 3] [--threads 2]

One process trains a random Qwen2 of 4.6 M parameters in fp32 on this machine's CPU. Responses have lengths between half
of `--new` and `--new`; `--even` gives all the full length. Layouts alternate within each round, so that a busy
machine is unfair to none. Prints one JSON object: CPU seconds per update of every round, and the ratio of the medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from iiverl_core.algorithms import find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.config import FSDPConfig, ModelConfig, OptimConfig, build, run_config
from iiverl_core.samples import TokenSequence
from iiverl_core.training import LayoutKind, MicroBatch, ModelSpec
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.losses import actor_loss
from iiverl_core.training.planning import Packing, SequenceSize, micro_batches
from iiverl_fsdp.backend import FSDPBackend

CPU = torch.device("cpu")
VOCABULARY = 4096
LAYOUTS: tuple[LayoutKind, ...] = ("padded", "packed", "shared")
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}


def main() -> None:
    """Time the layouts and print what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "prompts": 8,
        "group": 8,
        "prompt": 32,
        "new": 128,
        "rounds": 3,
        "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=4096, help="token budget of a micro-batch")
    parser.add_argument("--even", action="store_true", help="all responses have the full length")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        path = make_model(Path(folder) / "model")
        backends = {name: build_backend(path, packed=name != "padded") for name in LAYOUTS}
        sequences = make_sequences(arguments)
        loss = actor_loss(run_config(build({})).loss, find_policy_loss("vanilla"), RolloutCorrection())
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            for name, backend in backends.items():
                # Sequences whose groups are unknown share no prompts.
                groups = [i // arguments.group for i in range(len(sequences))] if name == "shared" else []
                batches = divide(sequences, groups, Packing(tokens=arguments.tokens, layout=name))
                start = time.process_time()
                backend.forward_backward(batches, loss, entropy=True, entropy_gradient=False)
                backend.step(1e-6)
                seconds[name].append(round(time.process_time() - start, 3))
        dist.destroy_process_group()
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "parameters": backends["padded"].parameter_count(),
                "tokens": sum(len(sequence.token_ids) for sequence in sequences),
                "CPU seconds": {name: times[1:] for name, times in seconds.items()},
                "padded / this": {name: round(medians["padded"] / x, 2) for name, x in medians.items()},
            }
        )
    )


def make_model(path: Path) -> str:
    """Save the random model."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return str(path)


def build_backend(path: str, *, packed: bool) -> FSDPBackend:
    """Build the actor, alone on this machine."""
    return FSDPBackend(
        ModelSpec(
            role="actor",
            model=ModelConfig(path=path, use_remove_padding=packed, enable_gradient_checkpointing=False),
            parallel=FSDPConfig(mixed_precision=FP32),
            device=CPU,
            optim=OptimConfig(),
        )
    )


def make_sequences(arguments: argparse.Namespace) -> list[TokenSequence]:
    """Make random responses to random prompts."""
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(arguments.prompts):
        prompt = rng.integers(0, VOCABULARY, arguments.prompt)
        for _ in range(arguments.group):
            new = arguments.new if arguments.even else rng.integers(arguments.new // 2, arguments.new + 1)
            response = rng.integers(0, VOCABULARY, new)
            sequences.append(TokenSequence.single_turn(prompt, response, np.zeros(new, dtype=np.float32)))
    return sequences


def divide(sequences: list[TokenSequence], groups: list[int], packing: Packing) -> list[MicroBatch]:
    """Build the micro-batches of one rank, with made-up advantages."""
    sizes = [
        SequenceSize(len(each.token_ids), len(each.token_ids) - each.trained, groups[i])
        if groups
        else SequenceSize(len(each.token_ids))
        for i, each in enumerate(sequences)
    ]
    (batches,) = micro_batches(sizes, [range(len(sizes))], packing)
    inv_num_tokens = 1 / sum(sequence.trained for sequence in sequences)
    return [
        make_micro_batch(
            [sequences[i] for i in batch],
            {"advantages": [np.full(sequences[i].trained, (-1.0) ** i, dtype=np.float32) for i in batch]},
            [inv_num_tokens] * len(batch),
            inv_num_tokens=inv_num_tokens,
            groups=[groups[i] for i in batch] if groups else (),
            device=CPU,
        )
        for batch in batches
    ]


if __name__ == "__main__":
    main()
