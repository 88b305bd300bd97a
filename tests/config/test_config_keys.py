"""Every key that existing files may hold is known, with its default under each backend, and says what it does."""

import json
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.config import Config, Loaded, load
from iiverl_core.config.schema import keys, sections
from iiverl_core.config.sections.section import NotYet, OnlyWhen

LINES = Path(__file__).with_name("keys.txt").read_text(encoding="utf-8").splitlines()
ROWS = [line.split(" | ") for line in LINES if line and not line.startswith("#")]
OTHERWISE_HERE = {
    "trainer.logger": ("console", "tensorboard", "jsonl"),  # nothing leaves the machine unasked
    "actor_rollout_ref.model.use_remove_padding": None,  # packed if the model's attention allows
    "critic.model.use_remove_padding": None,
    "reward_model.model.use_remove_padding": None,
    "actor_rollout_ref.rollout.enforce_eager": False,  # generation is faster with CUDA graphs
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,  # faster for a model that fits into one device
}
SAME_AS_FSDP = {
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.rollout.load_format": "dummy_dtensor",
    "actor_rollout_ref.rollout.enable_chunked_prefill": True,
    "critic.model.enable_gradient_checkpointing": True,
    "trainer.resume_mode": "auto",
    "trainer.test_freq": -1,
}
"""Defaults under Megatron that are FSDP's, since no file needs II-VERL's."""


def value_of(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def normal(value: Any) -> Any:
    """Lists of one are the same as their item, numbers in quotes the same as numbers, ~ the home folder."""
    if isinstance(value, list | tuple):
        return normal(value[0]) if len(value) == 1 else [normal(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return str(Path(value).expanduser()) if value.startswith("~") else value
    return value


@pytest.mark.parametrize("path", [row[0] for row in ROWS])
def test_the_key_is_known_and_described(path: str) -> None:
    assert keys()[path].description.endswith(".")


@pytest.mark.parametrize(("column", "strategy"), [(1, "fsdp"), (2, "megatron")])
def test_defaults_are_those_of_the_backend(column: int, strategy: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"actor_rollout_ref: {{actor: {{strategy: {strategy}}}}}")
    config = load(file).config
    for path, *defaults in ROWS:
        written = defaults[column - 1]
        if path in OTHERWISE_HERE:
            assert value_of(config, path) == OTHERWISE_HERE[path]
        elif strategy == "megatron" and path in SAME_AS_FSDP:
            assert value_of(config, path) == SAME_AS_FSDP[path]
        elif written.startswith("= "):
            assert value_of(config, path) == value_of(config, written[2:]), path
        elif written != "—":
            wanted = json.loads(written)
            if path == "trainer.default_local_dir":
                wanted = "checkpoints/verl_examples/gsm8k"
            assert normal(value_of(config, path)) == normal(wanted), path


@pytest.mark.parametrize("column", [1, 2])
def test_a_file_of_all_defaults_loads_unchanged(column: int, tmp_path: Path) -> None:
    lines = []
    for path, *defaults in ROWS:
        if defaults[column - 1] != "—":
            *levels, name = path.split(".")
            written = defaults[column - 1]
            value = f"${{{written[2:]}}}" if written.startswith("= ") else json.loads(written)
            lines.append((levels, name, value))
    tree: dict[str, Any] = {}
    for levels, name, value in lines:
        section = tree
        for level in levels:
            section = section.setdefault(level, {})
        section[name] = value
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tree))
    loaded = load(file)
    assert not loaded.errors
    written = {path: json.loads(default) for path, _, default in ROWS if path in SAME_AS_FSDP}
    otherwise = [f"{path}={json.dumps(value)}" for path, value in written.items() if column == 2]
    strategy = f"actor_rollout_ref.actor.strategy={'fsdp' if column == 1 else 'megatron'}"
    otherwise += [
        f"{path}={row[column - 1]}"
        for path, *row in ROWS
        if path in OTHERWISE_HERE and row[column - 1] != "—"
    ]
    defaults = load_text(tmp_path, strategy, *otherwise)
    assert loaded.config == defaults.config


def test_defaults_of_the_backends_differ_only_where_files_need_it(tmp_path: Path) -> None:
    fsdp, megatron = (
        load_text(tmp_path, f"actor_rollout_ref.actor.strategy={strategy}")
        for strategy in ("fsdp", "megatron")
    )
    differ = {path for path in keys() if value_of(fsdp.config, path) != value_of(megatron.config, path)}
    strategies = {
        "actor_rollout_ref.actor.strategy",
        "actor_rollout_ref.ref.strategy",
        "critic.strategy",
        "reward_model.strategy",
    }
    assert differ == {*strategies, "actor_rollout_ref.actor.shuffle", "critic.shuffle"}
    assert str(megatron.origins["actor_rollout_ref.actor.shuffle"]) == "default of backend megatron"


def test_a_default_follows_its_key(tmp_path: Path) -> None:
    following = [(path, written[2:]) for path, written, _ in ROWS if written.startswith("= ")]
    assert len(following) > 20
    for path, followed in following:
        default = keys()[followed].default
        number = isinstance(default, int) or followed.endswith(("batch_size", "per_gpu"))
        other: Any = (
            not default if isinstance(default, bool) else 7 if number else 0.7 if default == 0.2 else "other"
        )
        if isinstance(default, str) and default.startswith("${"):
            continue  # it follows a third key, whose own row is tried
        loaded = load_text(tmp_path, f"{followed}={json.dumps(other)}")
        assert value_of(loaded.config, path) == other, path
        assert str(loaded.origins[path]) == f"default, same as {followed}"


def load_text(folder: Path, *overrides: str) -> Loaded:
    file = folder / "empty.yaml"
    file.touch()
    return load(file, overrides)


def test_conditions_of_marks_name_keys() -> None:
    for key in keys().values():
        for mark in key.marks:
            if isinstance(mark, OnlyWhen):
                assert mark.key in keys()
                assert mark.instead is None or mark.instead in keys()
            if isinstance(mark, NotYet):
                assert mark.ready or not mark.blocks


def test_every_section_is_described() -> None:
    for path, section in sections().items():
        assert section.__doc__ and section.__doc__.strip().endswith("."), path
