"""GRPO in one process and one file, to read from top to bottom.

    python examples/quickstart/make_inputs.py && python examples/loop.py

It trains the quickstart's model on the quickstart's task with the functions of `iiverl train-ppo`, and gets the same
rewards step by step (`tests/repository/test_repository_loop.py`). The real loop adds worker processes and sharded models
(FSDP, Megatron), engines on other devices (vLLM), scoring during generation, failed rewards, micro-batches, KL penalties
and a critic.

Suffixes: `_T` the response tokens of a batch one after another, `_B` one entry per response.
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from iiverl_core.algorithms import (
    AdvantageBatch,
    AdvantageSettings,
    PolicyBatch,
    PolicyLossSettings,
    Segments,
)
from iiverl_core.algorithms.advantages.grpo import grpo
from iiverl_core.algorithms.policy_losses.vanilla import vanilla
from iiverl_core.data import PromptOrder, load_prompts
from iiverl_core.rollout import GenerationRequest, SamplingParams, generate
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.samples import SampleId, TokenSequence
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.head import head_log_probs
from iiverl_core.training.layout import lay_out

QUICKSTART = Path(__file__).parent / "quickstart"
PROMPTS, RESPONSES, MAX_TOKENS = 32, 16, 8  # prompts per step, responses per prompt, tokens per response
LEARNING_RATE, GRAD_CLIP, SEED = 2e-3, 1.0, 1


def main(steps: int, inputs: Path = QUICKSTART / "inputs") -> list[float]:
    """Train on the files of `make_inputs.py` for some steps, and return the mean reward of each."""
    model = str(inputs / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = load_prompts([str(inputs / "train.jsonl")], ["train"], tokenizer, max_prompt_length=8)
    order = PromptOrder(len(prompts), PROMPTS, seed=SEED)
    compute_score = runpy.run_path(str(QUICKSTART / "reward.py"))["compute_score"]

    # Two copies of the weights: one is trained, the other generates. The engine has its own forward pass with a
    # key-value cache, and computes a prompt once for all its responses.
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    engine = HFEngine(model, dtype=torch.float32, device="cpu")

    rewards = []
    for step in range(1, steps + 1):
        engine.update_weights(policy.state_dict().items(), version=step - 1)

        # 1. Sample several responses to each prompt. Which prompts a step gets, and the random numbers of each
        #    response are functions of seed, step, group and member, so any step can be repeated by itself.
        _, rows = order.batch(step - 1)
        group = [prompts[row] for row in rows]
        requests = [
            GenerationRequest(SampleId("train", step, g, member), prompt.ids, seed=_seed(step, g))
            for g, prompt in enumerate(group)
            for member in range(RESPONSES)
        ]
        completions = sorted(
            generate(engine, requests, SamplingParams(max_tokens=MAX_TOKENS)),
            key=lambda done: done.request.id,
        )
        asked = [group[done.request.id.group] for done in completions]

        # 2. Score them.
        texts = tokenizer.batch_decode([done.token_ids for done in completions], skip_special_tokens=True)
        scores = [
            compute_score(prompt.data_source, text, prompt.ground_truth, None)
            for prompt, text in zip(asked, texts, strict=True)
        ]

        # 3. Compare each response with the others to the same prompt. No critic, no reference.
        segments = Segments.of([len(done.token_ids) for done in completions])
        batch = AdvantageBatch(
            rewards_T=segments.at_last(torch.tensor(scores)),
            segments=segments,
            group_B=torch.tensor([done.request.id.group for done in completions]),
        )
        advantages_T, _ = grpo(batch, AdvantageSettings())

        # 4. Make better responses likelier. With one update per step the old log-probs are the current ones, so the ratio
        #    is 1 and PPO never clips.
        sequences = [
            TokenSequence.single_turn(prompt.ids, done.token_ids, done.log_probs)
            for prompt, done in zip(asked, completions, strict=True)
        ]
        layout = lay_out(sequences, "padded", torch.device("cpu"))
        hidden_BLD = policy.model(layout.input_ids_BL, use_cache=False).last_hidden_state
        hidden_TD = hidden_BLD[layout.rows_T, layout.columns_T]
        log_probs_T, _ = head_log_probs(
            hidden_TD, policy.lm_head.weight, layout.targets_T, 1.0, entropy=False
        )
        losses_T, _ = vanilla(
            PolicyBatch(log_probs_T, log_probs_T.detach(), advantages_T, segments), PolicyLossSettings()
        )
        weights_B = token_weights("token-mean", segments.lengths_B.tolist(), MAX_TOKENS)
        (segments.expand(torch.tensor(weights_B)) @ losses_T).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()

        rewards.append(sum(scores) / len(scores))
        print(f"step {step:3d}  reward {rewards[-1]:.3f}")
    return rewards


def _seed(step: int, group: int) -> int:
    """Derive the seed of a prompt's responses."""
    return int(np.random.SeedSequence([0, step, 0, group]).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 120)
