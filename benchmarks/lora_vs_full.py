"""Does a run with LoRA adapters reach the reward of one that trains all weights?

    python benchmarks/lora_vs_full.py [--seeds 3] [--steps 40] [--lr 2e-3] [--full-lr 5e-4] [--json FILE]
    python benchmarks/lora_vs_full.py --start 40 --steps 80 --lr 5e-3 --full-lr 2e-3

Both learn the quickstart's task from the same model. By default that is the quickstart's random model after `--pretraining`
steps of next-token prediction: it continues a word with its letters in one of four orders, each equally often, and the task
rewards one of them. With `--start` it is the quickstart's model after so many of its own steps instead, whose head has
learned little yet. `head_bound` is the probability of a letter, averaged over letters, that the head gives at most,
whatever the hidden state: adapters leave the head and the last norm as they are, so no reward can be much above it.

For each seed, which decides the order of the prompts and the sampling, one run of each kind follows the other, so that both
see the same machine. `first` and `last` are the mean reward of sampled responses (`critic/score/mean`) over the first and
the last five steps, `greedy` is the reward of greedy responses to words that no run was trained on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from learning import QUICKSTART, ends, spread

FULL, ADAPTERS = "all weights", "adapters"
GREEDY = "val/test_score/echo"
RANK = 16
ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (2, 3, 0, 1))
"""Orders of a word's letters that the model is pretrained on: as they are, reversed, and moved by one and by two."""
WORDS_PER_STEP = 256


def train(inputs: Path, model: Path, folder: Path, *, seed: int, steps: int, more: tuple[str, ...]) -> Path:
    """Run the quickstart on one process without Ray, and return its folder."""
    overrides = [
        f"data.train_files={inputs}/train.jsonl",
        f"data.val_files={inputs}/val.jsonl",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.rollout.seed={seed}",
        f"custom_reward_function.path={QUICKSTART}/reward.py",
        "trainer.runtime=local",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=false",
        f"trainer.test_freq={steps}",
        "trainer.logger=[jsonl]",
        "trainer.rollout_data_dir=null",
        f"trainer.default_local_dir={folder}",
        *more,
    ]
    command = [Path(sys.executable).with_name("iiverl"), "train-ppo", QUICKSTART / "quickstart.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a run ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return folder


def pretrain(inputs: Path, model: Path, folder: Path, steps: int) -> None:
    """Teach the model to continue words, of those for training, with their letters in a random one of `ORDERS`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    words_WL = torch.tensor([tokenizer.convert_tokens_to_ids(list(row["ground_truth"])) for row in rows])
    orders, ends = torch.tensor(ORDERS), torch.ones(WORDS_PER_STEP, 1, dtype=torch.int64)
    asks = ends * tokenizer.convert_tokens_to_ids("=")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        words_BL = words_WL[torch.randint(len(words_WL), (WORDS_PER_STEP,), generator=generator)]
        order_BL = orders[torch.randint(len(orders), (WORDS_PER_STEP,), generator=generator)]
        tokens = [words_BL, asks, words_BL.gather(1, order_BL), ends * tokenizer.eos_token_id]
        tokens_BT = torch.cat(tokens, 1)
        labels_BT = tokens_BT.clone()
        labels_BT[:, : words_BL.shape[1] + 1] = -100  # the prompt
        loss = network(input_ids=tokens_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"pretrained to a loss of {loss.item():.3f} per token", flush=True)


def head_bound(model: Path, letters: str) -> float:
    """Find, for each letter, the hidden state to which the head gives its highest probability, and average these."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(list(letters))
    generator = torch.Generator().manual_seed(0)
    hidden_LD = torch.randn(len(letters), network.config.hidden_size, generator=generator, requires_grad=True)
    optimizer = torch.optim.Adam([hidden_LD], lr=0.05)
    for _ in range(1000):
        log_probs_LV = network.lm_head(network.model.norm(hidden_LD)).log_softmax(-1)
        log_probs_L = log_probs_LV[range(len(tokens)), tokens]
        optimizer.zero_grad()
        (-log_probs_L.sum()).backward()
        optimizer.step()
    return log_probs_L.exp().mean().item()


def compare(
    inputs: Path, start: Path, folder: Path, *, kind: str, seed: int, arguments: argparse.Namespace
) -> dict:
    """Train one kind from one seed."""
    more = ["trainer.save_freq=-1", f"actor_rollout_ref.actor.optim.lr={arguments.full_lr}"]
    if kind == ADAPTERS:
        more = [
            "trainer.save_freq=-1",
            f"actor_rollout_ref.model.lora_rank={RANK}",
            f"actor_rollout_ref.model.lora_alpha={2 * RANK}",
            f"actor_rollout_ref.actor.optim.lr={arguments.lr}",
            "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        ]
    started = time.perf_counter()
    train(inputs, start, folder, seed=seed, steps=arguments.steps, more=tuple(more))
    first, last = ends(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    greedy = next(line[GREEDY] for line in reversed(lines) if GREEDY in line)
    found = {"kind": kind, "seed": seed, "first": first, "last": last, "greedy": greedy}
    found["seconds"] = time.perf_counter() - started
    print(
        f"seed {seed}, {kind}: {first:.3f} -> {last:.3f}, greedy {greedy:.3f}, in {found['seconds']:.0f} s",
        flush=True,
    )
    return found


def table(runs: list[dict]) -> str:
    """Lay the runs out by kind: mean and standard deviation over seeds, and the ratio of the means."""
    columns = ("first", "last", "greedy")
    lines = [f"| trained | {' | '.join(columns)} |", "|---|---|---|---|"]
    means = {}
    for kind in (FULL, ADAPTERS):
        mine = [run for run in runs if run["kind"] == kind]
        means[kind] = [statistics.fmean(run[key] for run in mine) for key in columns]
        lines.append(f"| {kind} | {' | '.join(spread([run[key] for run in mine]) for key in columns)} |")
    ratios = [adapters / full for adapters, full in zip(means[ADAPTERS], means[FULL], strict=True)]
    return "\n".join(
        [*lines, f"| adapters / all weights | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |"]
    )


def main() -> None:
    """Train the start, then both kinds from each seed in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of next-token prediction")
    parser.add_argument(
        "--start", type=int, default=0, help="steps of the quickstart instead, with all weights"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the adapters")
    parser.add_argument("--full-lr", type=float, default=5e-4, help="learning rate of all weights")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        sys.path.insert(0, str(QUICKSTART))
        import make_inputs

        make_inputs.make_data(inputs)
        start = inputs / "model"
        make_inputs.make_model(start)
        if arguments.start:
            more = (f"trainer.save_freq={arguments.start}",)
            base = train(inputs, start, inputs / "base", seed=0, steps=arguments.start, more=more)
            start = base / f"global_step_{arguments.start}" / "actor" / "huggingface"
        else:
            pretrain(inputs, start, inputs / "pretrained", arguments.pretraining)
            start = inputs / "pretrained"
        bound = head_bound(start, make_inputs.LETTERS)
        print(f"the head gives a letter a probability of at most {bound:.3f}", flush=True)
        runs = [
            compare(inputs, start, inputs / f"{kind}-{seed}", kind=kind, seed=seed, arguments=arguments)
            for seed in range(1, arguments.seeds + 1)
            for kind in (FULL, ADAPTERS)
        ]
    print(f"\n{table(runs)}")
    if arguments.json:
        settings = {"python": platform.python_version(), "cpus": os.cpu_count(), "rank": RANK}
        settings |= {
            name: getattr(arguments, name) for name in ("pretraining", "start", "steps", "lr", "full_lr")
        }
        settings["head_bound"] = bound
        arguments.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
