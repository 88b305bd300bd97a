"""Train with TRL: `theirs.py SETTING.json`, paced by `grpo_step.py`, in an environment that has trl and accelerate."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pacing import Pacer
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Reward by the parity of the first token, so that groups differ."""
    return [float(ids[0] % 2) for ids in completion_ids]


class Timed(GRPOTrainer):
    """Adds up the time of generation."""

    generation = 0.0

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = super()._generate_and_score_completions(*args, **kwargs)
        self.generation += time.perf_counter() - start
        return found


class Paced(TrainerCallback):
    """Lets a step begin when it may, and reports it."""

    def __init__(self, pacer: Pacer) -> None:
        self.pacer, self.start = pacer, 0.0
        self.trainer: Any = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Wait, and start the clock."""
        self.pacer.begin()
        self.start, self.trainer.generation = time.perf_counter(), 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Report the step."""
        generation = self.trainer.generation
        self.pacer.end({"gen": generation, "update_actor": time.perf_counter() - self.start - generation})


def main() -> None:
    """Run TRL's trainer with the setting's sizes; every response has the full length."""
    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    pacer = Paced(Pacer())
    tokenizer = AutoTokenizer.from_pretrained(setting["model"], padding_side="left")
    arguments = GRPOConfig(
        output_dir=setting["folder"],
        use_cpu=setting["device"] == "cpu",
        bf16=setting["dtype"] == "bf16",
        per_device_train_batch_size=setting["micro_batch"],
        gradient_accumulation_steps=setting["samples"] // setting["micro_batch"],
        num_generations=setting["group"],
        max_completion_length=setting["new"],
        generation_kwargs={"min_new_tokens": setting["new"]},
        max_steps=setting["steps"],
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Timed(
        model=setting["model"],
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in setting["prompts"]]),
        processing_class=tokenizer,
        callbacks=[pacer],
    )
    pacer.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    main()
