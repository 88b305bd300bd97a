"""Imports run one way: between packages, between the layers of the core, and never to what a layer must not import."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
CORE = PACKAGES / "iiverl-core" / "src" / "iiverl_core"

TABLE = re.findall(
    r"^\| `(\w+)(?:/|\.py)` \|.*\| ([^|]*) \|$", (ROOT / "docs/architecture.md").read_text(), re.M
)
FORBIDDEN = {layer: set(re.findall(r"\w+", names.lower())) for layer, names in TABLE}
LAYERS = list(FORBIDDEN)[::-1]
"""From below, as the table of the architecture lists them from above."""

ALLOWED = {
    "iiverl_reward_client": {"iiverl_reward_client"},
    "iiverl_core": {"iiverl_core", "iiverl_reward_client"},
    "iiverl_fsdp": {"iiverl_fsdp", "iiverl_core"},
    "iiverl_megatron": {"iiverl_megatron", "iiverl_core"},
    "iiverl_cli": {"iiverl_cli", "iiverl_core", "iiverl_reward_client"},
}


def imported(file: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that import statements name, and `module.name` for each name taken from one."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(file: Path) -> set[str]:
    """All that a file imports, anywhere in it."""
    return imported(file, ast.walk(ast.parse(file.read_text())))


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: none in functions, none for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import(child)


@cache
def file_of(module: str) -> Path | None:
    """The file of one of our modules; None for a name in a module, or a module of another project."""
    package, *rest = module.split(".")
    path = (PACKAGES / package.replace("_", "-") / "src" / package).joinpath(*rest)
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()), None)


@cache
def imports_at_import(file: Path) -> set[str]:
    return imported(file, at_import(ast.parse(file.read_text())))


def chains(module: str) -> dict[str, list[str]]:
    """All modules that importing a module imports, ours and others', each with the way to it."""
    found: dict[str, list[str]] = {module: [module]}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = file_of(name)
        if file is None:
            continue
        parents = [name.rpartition(".")[0]] if "." in name else []
        for other in (*parents, *sorted(imports_at_import(file))):
            if other not in found:
                found[other] = [*found[name], other]
                waiting.append(other)
    return found


def files_of(layer: str) -> list[Path]:
    return [CORE / f"{layer}.py"] if (CORE / f"{layer}.py").exists() else sorted((CORE / layer).rglob("*.py"))


def test_every_module_of_the_core_is_a_layer() -> None:
    modules = {p.stem for p in CORE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert modules - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_layers_below_it(layer: str) -> None:
    below = set(LAYERS[: LAYERS.index(layer) + 1])
    for file in files_of(layer):
        for module in imports(file):
            if module.startswith("iiverl_core."):
                assert module.split(".")[1] in below, f"{file} imports {module}"


@pytest.mark.parametrize("layer", LAYERS)
def test_importing_a_layer_imports_nothing_that_it_must_not(layer: str) -> None:
    for file in files_of(layer):
        module = ".".join(file.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")
        for name, way in chains(module).items():
            assert name.split(".")[0] not in FORBIDDEN[layer], " → ".join(way)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_must_not_import_torch_or_ray_does_not_do_so_later(layer: str) -> None:
    for file in files_of(layer):
        known = {name.split(".")[0] for name in imports(file)} & FORBIDDEN[layer] & {"torch", "ray"}
        assert not known, f"{file} imports {known}"


def test_algorithms_import_torch_and_nothing_else() -> None:
    allowed = {"torch", "iiverl_core"} | set(sys.stdlib_module_names)
    for file in files_of("algorithms"):
        assert {module.split(".")[0] for module in imports(file)} <= allowed, file


def test_only_the_runtime_on_ray_knows_ray() -> None:
    knowing = [
        file.name for file in CORE.rglob("*.py") if any(m.split(".")[0] == "ray" for m in imports(file))
    ]
    parts = ("actor", "connection", "engines", "group", "placement", "pool", "start")
    assert sorted(knowing) == [f"ray_{part}.py" for part in parts]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_one_way(package: str) -> None:
    folder = PACKAGES / package.replace("_", "-") / "src" / package
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        ours = {m.split(".")[0] for m in imports(file) if m.startswith("iiverl")}
        assert ours <= ALLOWED[package], f"{file} imports {ours}"
