"""The section `data`: which prompts, in which order, and how many a step."""

from typing import Annotated, Literal

from iiverl_core.config.sections.algorithm import FILTERED
from iiverl_core.config.sections.section import Count, Int, Names, NoEffect, Path, Paths, Section, follows


class DataConfig(Section):
    """Which prompts, in which order, and how many a step."""

    tokenizer: Path | None = None
    """Folder or Hub name of the tokenizer; null takes the model's own."""
    train_files: Paths = ("~/data/rlhf/gsm8k/train.parquet",)
    """What to train on: parquet, jsonl, csv or arrow files, `save_to_disk` folders, Hub names (`org/name:config@revision`)."""
    val_files: Paths | None = ("~/data/rlhf/gsm8k/test.parquet",)
    """What to validate on, in the same forms; null, or `train_files` without it, for no validation."""
    train_split: Names = ("train",)
    """Split of each training dataset that has splits: one for all, or a list with one for each of `train_files`."""
    val_split: Names = ("test",)
    """Split of each validation dataset that has splits: one for all, or a list with one for each of `val_files`."""
    prompt_key: str = "prompt"
    """Column that holds the prompt: a chat, a list of `{role, content}`, or a plain string."""
    ground_truth_key: str | None = None
    """Column that holds the ground truth; null takes `reward_model.ground_truth`, or else `ground_truth`."""
    data_source_key: str = follows("data.reward_fn_key")
    """Column that holds the data source, by which the built-in rules are chosen and validation scores are grouped."""
    reward_fn_key: str = "data_source"
    """verl's name for `data_source_key`."""
    max_prompt_length: Count = 512
    """Tokens in a prompt at most, after the chat template."""
    max_response_length: Count = 512
    """Tokens in a response at most."""
    train_batch_size: Count = 1024
    """Prompts in a training step; each is answered `actor_rollout_ref.rollout.n` times."""
    gen_batch_size: Annotated[Count, FILTERED] = follows("data.train_batch_size")
    """Prompts that are answered at a time to fill a step with groups that `algorithm.filter_groups` keeps."""
    val_batch_size: Count | None = None
    """Prompts given to the rollout engine at a time in validation; null for all of them."""
    shuffle: bool = True
    """Give the training prompts in a new order each epoch."""
    seed: Int = 1
    """Seed of that order."""
    filter_overlong_prompts: bool = False
    """Drop prompts longer than `max_prompt_length`."""
    truncation: Literal["error", "left", "right"] = "error"
    """What to do with a prompt that is still too long: stop, or cut it off at its left or right end."""
    trust_remote_code: Annotated[bool, NoEffect("a dataset's own code is never run")] = False
    """Let a dataset's own code run."""
    return_raw_input_ids: Annotated[bool, NoEffect("prompts always keep their token ids")] = False
    """Keep the token ids before the chat template."""
    return_raw_chat: Annotated[bool, NoEffect("prompts always keep their columns")] = False
    """Keep the chat as it stood in the dataset."""
    image_key: Annotated[str, NoEffect("prompts are text only")] = "images"
    """Column that holds images."""
