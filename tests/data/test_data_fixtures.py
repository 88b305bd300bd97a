"""The tokenizer and the model that the other tests stand on."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_the_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= i < 259 for i in ids)


def test_the_saved_tokenizer_reads_like_the_one_in_memory(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_model_path: Path
) -> None:
    saved = AutoTokenizer.from_pretrained(tiny_model_path)
    text = "<|im_start|>user\n  2+3?  Zürich<|im_end|>"
    assert saved(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert (saved.eos_token_id, saved.pad_token_id) == (258, 256)
    assert saved.chat_template == tiny_tokenizer.chat_template


def test_the_saved_model_is_small_and_has_the_tokenizers_ids(tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert model.config.vocab_size == 320
    assert (model.config.eos_token_id, model.config.pad_token_id) == (258, 256)
    assert model.dtype.is_floating_point and model.dtype.itemsize == 4
