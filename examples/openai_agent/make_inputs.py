"""Create the inputs: a random model, and rows that all ask for a number. Downloads nothing.

Writes to `inputs/`: `model/`, a transformer with random weights, a tokenizer of one token per character and a chat template,
and the datasets `train.jsonl` and `val.jsonl`, whose rows look like

    {"prompt": [{"role": "user", "content": "?"}]}
"""

import json
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789?<"
ROWS = {"train": 64, "val": 4}
TURNS = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(folder: Path) -> None:
    """Save a random two-layer Qwen2 with about 80 000 parameters, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    characters = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(ALPHABET)}, merges=[]))
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(["<end>", "<user>", "<assistant>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<end>", pad_token="<end>", chat_template=TURNS
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write the same row several times, for training and for validation."""
    row = {"prompt": [{"role": "user", "content": "?"}]}
    for name, count in ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * count)


if __name__ == "__main__":
    INPUTS.mkdir(exist_ok=True)
    make_data(INPUTS)
    make_model(INPUTS / "model")
    print("made a model that knows nothing, and rows for its agent, in examples/openai_agent/inputs/")
