"""The section `data`: prompts, their order, and the batch size."""

from typing import Annotated, Any, Literal

from pydantic import Field

from iiverl_core.config.sections.algorithm import FILTERED
from iiverl_core.config.sections.section import (
    Count,
    Int,
    Names,
    NoEffect,
    PathStr,
    PathStrs,
    Section,
    follows,
)

MaxSamples = Annotated[Int, Field(ge=-1)] | None


class DataConfig(Section):
    """Prompts, their order, and the batch size."""

    tokenizer: PathStr | None = None
    """Folder or Hub name of the tokenizer; null for that of the model."""
    train_files: PathStrs = ("~/data/rlhf/gsm8k/train.parquet",)
    """Training data: parquet, jsonl, csv or arrow files, `save_to_disk` folders, or Hub names (`org/name:config@revision`)."""
    val_files: PathStrs | None = ("~/data/rlhf/gsm8k/test.parquet",)
    """Validation data, in the same forms; null for no validation, also the default if `train_files` is set."""
    train_split: Names = ("train",)
    """Split of the training datasets that have splits: one for all, or one for each of `train_files`."""
    val_split: Names = ("test",)
    """Split of the validation datasets that have splits: one for all, or one for each of `val_files`."""
    prompt_key: str = "prompt"
    """Column of the prompt: a chat, a list of `{role, content}`, or a plain string."""
    tools_key: str | None = "tools"
    """Column of the tool schemas that the chat template is given, if a dataset has it; null for none."""
    apply_chat_template_kwargs: dict[str, Any] = Field(default={})
    """Further variables of the chat template, such as `enable_thinking: false`."""
    ground_truth_key: str | None = None
    """Column of the ground truth; null for `reward_model.ground_truth` or, if there is none, `ground_truth`."""
    data_source_key: str = follows("data.reward_fn_key")
    """Column of the data source, which selects the built-in rule and groups validation scores."""
    reward_fn_key: str = "data_source"
    """verl's name for `data_source_key`."""
    train_max_samples: MaxSamples = None
    """Use that many rows of the training data, drawn with `seed`, or the first ones without `shuffle`; null, 0 or -1 for all."""
    val_max_samples: MaxSamples = None
    """The same for the validation data."""
    max_prompt_length: Count = 512
    """Maximum tokens of a prompt, after the chat template."""
    max_response_length: Count = 512
    """Maximum tokens of a response."""
    train_batch_size: Count = 1024
    """Prompts per training step, each with `actor_rollout_ref.rollout.n` responses."""
    gen_batch_size: Annotated[Count, FILTERED] = follows("data.train_batch_size")
    """Prompts per generation batch while a step is filled with groups that `algorithm.filter_groups` keeps."""
    val_batch_size: Count | None = None
    """Prompts per generation batch in validation; null for all."""
    shuffle: bool = True
    """Shuffle the training prompts in each epoch."""
    seed: Int = 1
    """Seed of the shuffling."""
    filter_overlong_prompts: bool = False
    """Drop prompts longer than `max_prompt_length`."""
    truncation: Literal["error", "left", "right"] = "error"
    """How to treat a prompt that is still too long: stop with an error, or truncate it on the left or right."""
    trust_remote_code: Annotated[bool, NoEffect("a dataset's own code is never run")] = False
    """Let a dataset's own code run."""
    return_raw_input_ids: Annotated[bool, NoEffect("prompts always keep their token ids")] = False
    """Keep the token ids before the chat template."""
    return_raw_chat: Annotated[bool, NoEffect("prompts always keep their columns")] = False
    """Keep the chat of the dataset."""
    image_key: str = "images"
    """Column of the images of prompts, if the model reads images: one or a list, each bytes, a path, a data URL or `{bytes, path}`."""
    min_pixels: Count | None = None
    """Minimum pixels of an image, which is enlarged to them; null for what the model's processor says."""
    max_pixels: Count | None = None
    """Maximum pixels of an image, which is reduced to them; null for what the model's processor says."""
