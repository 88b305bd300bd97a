"""Turn DAPO-Math-17k and AIME 2024 from the Hugging Face Hub into `data/train.jsonl` and `data/test.jsonl`."""

from pathlib import Path

from datasets import Dataset, load_dataset

FOLDER = Path(__file__).parent / "data"
SOURCES = {"train": "BytedTsinghua-SIA/DAPO-Math-17k", "test": "BytedTsinghua-SIA/AIME-2024"}


def rows(name: str) -> Dataset:
    """Load a dataset and keep each question once; the published one repeats rows."""
    seen: set[str] = set()
    kept = []
    for row in load_dataset(name, split="train"):
        question = row["prompt"][0]["content"]
        if question not in seen:
            seen.add(question)
            kept.append(
                {
                    "prompt": row["prompt"],
                    "data_source": row["data_source"],
                    "ground_truth": row["reward_model"]["ground_truth"],
                }
            )
    return Dataset.from_list(kept)


if __name__ == "__main__":
    for part, name in SOURCES.items():
        rows(name).to_json(FOLDER / f"{part}.jsonl")
