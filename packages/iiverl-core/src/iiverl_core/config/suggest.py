"""For a key that nothing knows: the one that was probably meant."""

from difflib import SequenceMatcher, get_close_matches

from iiverl_core.config.schema import join, keys, sections, shared_sections

MOVED = {
    "reward.custom_reward_function": "custom_reward_function",
    "reward.reward_manager": "reward_model.reward_manager",
    "reward.reward_manager.name": "reward_model.reward_manager",
    "reward.reward_model": "reward_model",
    "reward.reward_kwargs": "custom_reward_function.reward_kwargs",
    "actor_rollout_ref.actor.kl_coef": "actor_rollout_ref.actor.kl_loss_coef",
}
"""Keys of later versions of verl, and a guess that is often made, with the place where they belong."""


def suggest(path: str) -> str:
    """Complete the sentence that a key is not known; empty where nothing is like it."""
    moved = _moved(path)
    if moved:
        return f"it belongs at {moved}"
    section, _, name = path.rpartition(".")
    siblings = list(sections()[section].model_fields) if section in sections() else []
    sibling = _nearest(name, siblings, 0.8)
    if sibling:
        return f"did you mean {join(section, sibling)}?"
    elsewhere = [known for known in (*keys(), *sections()) if known.rpartition(".")[2] == name]
    if elsewhere:
        return f"it belongs at {max(elsewhere, key=lambda known: _closeness(known, path))}"
    sibling = _nearest(name, siblings, 0.6)
    if sibling:
        return f"did you mean {join(section, sibling)}?"
    names = {known.rpartition(".")[2] for known in (*keys(), *sections())}
    other = _nearest(name, sorted(names), 0.8)
    if other:
        likely = [known for known in (*keys(), *sections()) if known.rpartition(".")[2] == other]
        return f"did you mean {max(likely, key=lambda known: _closeness(known, path))}?"
    return f"{section or 'the configuration'} has {', '.join(siblings)}" if 0 < len(siblings) <= 10 else ""


def leads_to_moved(path: str) -> bool:
    """Whether keys under this unknown one have moved elsewhere, so that it is they that are to be told."""
    return any(old.startswith(path + ".") for old in MOVED) and path not in MOVED


def nearest(word: str, choices: list[str]) -> str | None:
    """The choice that is spelled most like a word, if any is."""
    return _nearest(word, choices, 0.6)


def _moved(path: str) -> str | None:
    head, rest = path, ""
    while head:
        if head in MOVED:
            return MOVED[head] + rest
        head, _, name = head.rpartition(".")
        rest = f".{name}{rest}"
    return None


def _nearest(word: str, choices: list[str], cutoff: float) -> str | None:
    plain = {choice.lower().replace("-", "_"): choice for choice in choices}
    found = get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def _closeness(known: str, path: str) -> tuple[int, float]:
    return shared_sections(known, path), SequenceMatcher(None, known, path).ratio()
