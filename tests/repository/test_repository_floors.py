"""Imports run one way: between packages, between the floors of the core, and never to what a floor must not know."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[2] / "packages"
CORE = PACKAGES / "iiverl-core" / "src" / "iiverl_core"

FLOORS = [
    "errors", "installation", "dtypes", "python_files", "data_files", "columns", "registry", "config", "memory", "algorithms",
    "samples", "data", "training", "rollout",
    "rewards", "telemetry", "checkpoints", "cluster", "controller",
]  # fmt: skip

FORBIDDEN = {
    "errors": {"torch"},
    "python_files": {"torch", "ray", "transformers", "datasets"},
    "data_files": {"torch", "ray", "transformers", "datasets"},
    "columns": {"torch", "ray", "transformers", "datasets", "numpy"},
    "config": {"torch", "ray", "transformers", "datasets"},
    "memory": {"torch", "ray", "transformers", "datasets"},
    "registry": {"torch", "ray", "transformers", "datasets"},
    "data": {"ray", "torch"},
    "training": {"ray"},
    "rollout": {"ray"},
    "rewards": {"torch", "ray", "transformers"},
    "telemetry": {"torch", "ray", "transformers"},
    "checkpoints": {"torch", "ray", "transformers"},
    "controller": {"torch", "ray"},
}

ALLOWED = {
    "iiverl_reward_client": {"iiverl_reward_client"},
    "iiverl_core": {"iiverl_core", "iiverl_reward_client"},
    "iiverl_fsdp": {"iiverl_fsdp", "iiverl_core"},
    "iiverl_megatron": {"iiverl_megatron", "iiverl_core"},
    "iiverl_cli": {"iiverl_cli", "iiverl_core", "iiverl_reward_client"},
}


def imports(file: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


def files_of(floor: str) -> list[Path]:
    return [CORE / f"{floor}.py"] if (CORE / f"{floor}.py").exists() else sorted((CORE / floor).rglob("*.py"))


def test_every_room_of_the_core_is_a_floor() -> None:
    rooms = {p.stem for p in CORE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_floors_below_it(floor: str) -> None:
    below = set(FLOORS[: FLOORS.index(floor) + 1])
    for file in files_of(floor):
        for module in imports(file):
            if module.startswith("iiverl_core."):
                assert module.split(".")[1] in below, f"{file} imports {module}"


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_a_floor_does_not_know_what_it_must_not(floor: str) -> None:
    for file in files_of(floor):
        known = {module.split(".")[0] for module in imports(file)} & FORBIDDEN[floor]
        assert not known, f"{file} imports {known}"


def test_algorithms_import_torch_and_nothing_else() -> None:
    allowed = {"torch", "iiverl_core"} | set(sys.stdlib_module_names)
    for file in files_of("algorithms"):
        assert {module.split(".")[0] for module in imports(file)} <= allowed, file


def test_only_the_runtime_on_ray_knows_ray() -> None:
    knowing = [
        file.name for file in CORE.rglob("*.py") if any(m.split(".")[0] == "ray" for m in imports(file))
    ]
    assert sorted(knowing) == ["ray_connection.py", "ray_engines.py", "ray_group.py"]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_one_way(package: str) -> None:
    folder = PACKAGES / package.replace("_", "-") / "src" / package
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = {m.split(".")[0] for m in imports(file) if m.startswith("iiverl")}
        assert ours <= ALLOWED[package], f"{file} imports {ours}"
