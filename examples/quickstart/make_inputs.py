"""Create the quickstart's inputs: a random model, and words to repeat. Downloads nothing.

Writes to `inputs/`: `model/`, a transformer with random weights and a tokenizer of one token a letter, and the
datasets `train.jsonl` and `val.jsonl`, whose rows look like

    {"prompt": [{"role": "user", "content": "cafe"}], "data_source": "echo", "ground_truth": "cafe"}
"""

import itertools
import json
import random
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
ALPHABET = "abcdefghijklmnopqrstuvwxyz="
LETTERS = "abcdefgh"  # the letters of words; the model has to learn that it needs no others
WORD_LENGTH = 4
VALIDATION_WORDS = 64
TURNS = "{% for message in messages %}{{ message['content'] }}{% endfor %}="


def make_model(folder: Path) -> None:
    """Save a random two-layer Qwen2 with about 80 000 parameters, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    letters.decoder = decoders.Fuse()
    letters.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<end>", pad_token="<end>", chat_template=TURNS
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
    """Write all words of four letters, a few of them for validation."""
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=WORD_LENGTH)]
    random.Random(0).shuffle(words)
    for name, part in {"val": words[:VALIDATION_WORDS], "train": words[VALIDATION_WORDS:]}.items():
        rows = (
            {"prompt": [{"role": "user", "content": word}], "data_source": "echo", "ground_truth": word}
            for word in part
        )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    INPUTS.mkdir(exist_ok=True)
    make_data(INPUTS)
    make_model(INPUTS / "model")
    print("made a model that knows nothing, and words for it to say back, in examples/quickstart/inputs/")
