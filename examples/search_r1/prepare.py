"""Turn Natural Questions from the Hugging Face Hub into chats with their answers: `data/train.jsonl`, `data/test.jsonl`."""

from pathlib import Path

from datasets import load_dataset

INSTRUCTION = (
    "Answer the question. Reason first; search as often as you need to, and write the answer alone between <answer> and "
    "</answer>, for example <answer>Beijing</answer>.\n\nQuestion: "
)
TEST_QUESTIONS = 500
FOLDER = Path(__file__).parent / "data"


def as_row(example: dict) -> dict:
    """Prepend the instruction to the question, and keep all right answers."""
    return {
        "prompt": [{"role": "user", "content": INSTRUCTION + example["question"]}],
        "data_source": "nq",
        "ground_truth": example["golden_answers"],
    }


if __name__ == "__main__":
    for split in ("train", "test"):
        dataset = load_dataset("RUC-NLPIR/FlashRAG_datasets", "nq", split=split)
        if split == "test":
            dataset = dataset.select(range(TEST_QUESTIONS))
        dataset.map(as_row, remove_columns=dataset.column_names).to_json(FOLDER / f"{split}.jsonl")
