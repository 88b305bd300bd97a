"""Turn geometry3k from the Hugging Face Hub into chats with images and a ground truth: `data/train.parquet`, `data/test.parquet`."""

from pathlib import Path

from datasets import Dataset, Image, List, load_dataset

INSTRUCTION = "Reason inside <think> and </think> before you answer. Then write the final answer inside \\boxed{}, and nothing else."
FOLDER = Path(__file__).parent / "data"


def as_row(example: dict[str, str]) -> dict:
    """Append the instruction to the problem, which has <image> where the image goes."""
    return {
        "prompt": [{"role": "user", "content": f"{example['problem']} {INSTRUCTION}"}],
        "data_source": "hiyouga/geometry3k",
        "reward_model": {"style": "rule", "ground_truth": example["answer"]},
    }


def convert(dataset: Dataset) -> Dataset:
    """Convert all rows; their images stay encoded."""
    dataset = dataset.cast_column("images", List(Image(decode=False)))
    return dataset.map(as_row, remove_columns=["problem", "answer"])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for split in ("train", "test"):
        convert(load_dataset("hiyouga/geometry3k", split=split)).to_parquet(FOLDER / f"{split}.parquet")
