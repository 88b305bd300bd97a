"""Create the inputs: questions, and a model that can call functions but does not know which. Downloads nothing.

Writes to `inputs/`: `model/`, a small transformer, a tokenizer of one token per digit and per part of a call, and a chat
template, and the datasets `train.jsonl` and `val.jsonl`, whose rows look like

    {"prompt": [{"role": "user", "content": "37*46"}], "ground_truth": "1702", "function": "multiply"}

No question of `val.jsonl` is in `train.jsonl`. The model is trained for some seconds on demonstrations that show how a
call is written, and nothing about when it helps: `demonstration` has them.
"""

import json
import operator
import random
from pathlib import Path
from typing import Any

INPUTS = Path(__file__).parent / "inputs"
FUNCTIONS = {
    "add": ("+", operator.add),
    "subtract": ("-", operator.sub),
    "multiply": ("*", operator.mul),
}
NUMBERS = range(10, 100)
TRAIN, VALIDATION = 3000, 60  # questions
CALL_PARTS = (*(f'<tool_call>{{"name": "{name}", "arguments": {{"a": ' for name in FUNCTIONS), ', "b": ')
CALL_END = "}}</tool_call>"
TURNS = (
    "{% for tool in tools or [] %}<{{ tool['function']['name'] }}>{% endfor %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(folder: Path, steps: int = 500) -> None:
    """Save a two-layer Qwen2 with about 110 000 parameters, trained for `steps` on demonstrations, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    characters = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate("0123456789+-*")}, merges=[]))
    characters.decoder = decoders.Fuse()
    characters.add_tokens([*CALL_PARTS, CALL_END])
    tags = ["<end>", "<user>", "<assistant>", "<tool>", *(f"<{name}>" for name in FUNCTIONS)]
    characters.add_special_tokens(tags)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="<end>", pad_token="<end>", chat_template=TURNS
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    train_on_demonstrations(model, tokenizer, steps)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def train_on_demonstrations(model: Any, tokenizer: Any, steps: int) -> None:
    """Train a model to write what the assistant says in random demonstrations."""
    import torch

    draw = random.Random(0)
    tools = [{"type": "function", "function": {"name": name}} for name in FUNCTIONS]
    texts = tokenizer.apply_chat_template(
        [demonstration(draw) for _ in range(8192)], tools=tools, tokenize=False
    )
    ids = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
    begin, end = tokenizer.convert_tokens_to_ids(["<assistant>", "<end>"])
    labels, speaks = torch.full_like(ids, -100), torch.zeros(len(ids), dtype=torch.bool)
    for i in range(ids.shape[1]):
        labels[speaks, i] = ids[speaks, i]
        speaks = (speaks | (ids[:, i] == begin)) & (ids[:, i] != end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 3 * (1 - i / steps)))
    for _ in range(steps):
        rows = torch.randint(len(ids), (128,))
        model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def question(draw: random.Random) -> tuple[str, int, int]:
    """Draw a function's name and two numbers."""
    return draw.choice(list(FUNCTIONS)), draw.choice(NUMBERS), draw.choice(NUMBERS)


def demonstration(draw: random.Random) -> list[dict[str, str]]:
    """Make a conversation in which the assistant does not know what to do.

    It answers at once or calls a function, whatever the question is; and then its answer is what the function returned, or
    any number.
    """
    name, a, b = question(draw)
    messages = [{"role": "user", "content": f"{a}{FUNCTIONS[name][0]}{b}"}]
    called = draw.choice(list(FUNCTIONS))
    number = str(FUNCTIONS[called][1](draw.choice(NUMBERS), draw.choice(NUMBERS)))
    if draw.random() < 0.5:
        returned = str(FUNCTIONS[called][1](a, b))
        call = f'<tool_call>{{"name": "{called}", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
        messages += [{"role": "assistant", "content": call}, {"role": "tool", "content": returned}]
        number = returned if draw.random() < 0.5 else number
    return [*messages, {"role": "assistant", "content": number}]


def make_data(folder: Path) -> None:
    """Write different questions, some of them for validation."""
    draw, rows = random.Random(1), {}
    while len(rows) < TRAIN + VALIDATION:
        name, a, b = question(draw)
        sign, compute = FUNCTIONS[name]
        text = f"{a}{sign}{b}"
        rows[text] = {
            "prompt": [{"role": "user", "content": text}],
            "ground_truth": str(compute(a, b)),
            "function": name,
        }
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    for name, part in {"val": lines[:VALIDATION], "train": lines[VALIDATION:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))


if __name__ == "__main__":
    INPUTS.mkdir(exist_ok=True)
    make_data(INPUTS)
    make_model(INPUTS / "model")
    print("made a model and questions for it to answer, in examples/calculator/inputs/")
