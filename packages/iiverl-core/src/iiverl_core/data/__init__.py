"""Read datasets, turn their rows into prompts, and decide the order in which prompts are used."""

from iiverl_core.data.conversation import (
    ConversationWriter,
    check_conversations,
    load_conversation_writer,
    to_reward_tokens,
)
from iiverl_core.data.hub_models import check_model
from iiverl_core.data.images import ImageProcessor, load_image_processor
from iiverl_core.data.order import PromptOrder, too_few_prompts
from iiverl_core.data.prompts import PromptSet, Truncation, load_prompts
from iiverl_core.data.sources import DatasetRef, Table, load_table, parse_dataset
from iiverl_core.data.tokenizer import load_tokenizer, turn_end, write_tokenizer
from iiverl_core.errors import DataError

__all__ = [
    "ConversationWriter",
    "DataError",
    "DatasetRef",
    "ImageProcessor",
    "PromptOrder",
    "PromptSet",
    "Table",
    "Truncation",
    "check_conversations",
    "check_model",
    "load_conversation_writer",
    "load_image_processor",
    "load_prompts",
    "load_table",
    "load_tokenizer",
    "parse_dataset",
    "to_reward_tokens",
    "too_few_prompts",
    "turn_end",
    "write_tokenizer",
]
