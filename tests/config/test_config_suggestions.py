"""A suggestion means the same as the key that is not known, or there is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config.schema import keys, sections
from iiverl_core.config.suggest import nearest, suggest
from iiverl_core.config.synonyms import BY_NAME, BY_PATH, OTHER_MODELS, find_synonym

SECTIONS = sorted(path for path in sections() if path)
NAMES = sorted({path.rpartition(".")[2] for path in (*keys(), *sections()) if path})
NOT_HERE = [
    "actor_rollout_ref.actor.optim.override_optimizer_config.momentum",
    "actor_rollout_ref.rollout.repetition_penalty",
    "data.kl_coef",
    "trainer.entropy_coeff",
]
"""Unknown keys without a counterpart here."""


def test_every_synonym_leads_from_an_unknown_key_to_a_known_one() -> None:
    known = {*keys(), *sections()}
    for path, (target, _) in [*BY_PATH.items(), *BY_NAME.items()]:
        assert target in known, path
        assert path not in known, path


@pytest.mark.parametrize("path", BY_PATH)
def test_every_synonym_is_suggested(path: str) -> None:
    known, note = BY_PATH[path]
    suggested, hint = suggest(path)
    assert suggested == known
    assert hint == f"use {known}" + (f" ({note})" if note else "")


@pytest.mark.parametrize("path", NOT_HERE)
def test_what_has_no_counterpart_gets_no_suggestion(path: str) -> None:
    assert path not in keys(), "take it out of the list"
    assert suggest(path)[0] is None


@given(
    st.sampled_from(["", *SECTIONS]) | st.just("unknown.section"),
    st.sampled_from(NAMES)
    | st.sampled_from(sorted(BY_NAME))
    | st.builds(lambda name, at: name[:at] + name[at + 1 :], st.sampled_from(NAMES), st.integers(0, 20))
    | st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
)
def test_a_suggestion_is_in_the_table_or_in_the_same_section(section: str, name: str) -> None:
    path = f"{section}.{name}" if section else name
    if not name or path in keys() or path in sections():
        return
    suggested, _ = suggest(path)
    if suggested and suggested.rpartition(".")[0] != section:
        synonym = find_synonym(path)
        assert synonym
        assert suggested in (synonym.key, getattr(find_synonym(synonym.key), "key", None))
    for role in OTHER_MODELS:
        if section.startswith(role) and suggested:
            moved = ("data.", "critic.", "reward_model.", "actor_rollout_ref.ref.")
            assert suggested.startswith(moved), "another model's key is never that of the actor"


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("train_batch_sise", ["train_batch_size", "val_batch_size"], "train_batch_size"),
        ("Train-Files", ["train_files"], "train_files"),
        ("trainFiles", ["train_files"], "train_files"),
        ("prompt_max_length", ["max_prompt_length"], "max_prompt_length"),
        ("nnoeds", ["nnodes"], "nnodes"),
        ("batch_size", ["val_batch_size"], None),
        ("use_loss", ["use_kl_loss"], None),
        ("loss_coefficient_c", ["loss_coefficient"], None),
        ("use_token_level_loss", ["use_kl_loss"], None),
        ("clip_cov_b", ["clip_cov_lb", "clip_cov_ub"], None),
        ("top_x", ["top_k", "top_p"], None),
        ("k", ["n"], None),
        ("enable", ["engine"], None),
        ("x", [], None),
    ],
)
def test_a_misspelling_is_of_one_word(word: str, known: list[str], meant: str | None) -> None:
    assert nearest(word, known) == meant
