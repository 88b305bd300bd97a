"""Parts of `grpo_step.py`: the two programs that it compares, and what both of them import."""
