"""Turn GSM8K from the Hugging Face Hub into chats with a ground truth: `data/train.jsonl` and `data/test.jsonl`."""

from pathlib import Path

from datasets import load_dataset

INSTRUCTION = 'Think step by step and write the final number after "####".'
FOLDER = Path(__file__).parent / "data"


def as_row(example: dict[str, str]) -> dict:
    """Append the instruction to the question, and keep the number after #### of the answer."""
    return {
        "prompt": [{"role": "user", "content": f"{example['question']} {INSTRUCTION}"}],
        "data_source": "openai/gsm8k",
        "ground_truth": example["answer"].split("####")[-1].strip().replace(",", ""),
    }


if __name__ == "__main__":
    for split in ("train", "test"):
        dataset = load_dataset("openai/gsm8k", "main", split=split)
        dataset.map(as_row, remove_columns=dataset.column_names).to_json(FOLDER / f"{split}.jsonl")
