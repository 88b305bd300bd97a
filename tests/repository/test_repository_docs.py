"""Documentation that is generated is up to date, and code that is named in the rest exists."""

import ast
import builtins
import importlib.util
import re
import tomllib
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from iiverl_core.config.schema import keys, sections
from iiverl_core.registry import REGISTRIES
from iiverl_core.registry.metrics import describe

ROOT = Path(__file__).parents[2]
WHOLE = ["docs/architecture.md", "CONTRIBUTING.md"]  # every name in them is one of the project's
OTHERS = sorted(
    str(file.relative_to(ROOT))
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "packages").glob("*/README.md"))
    if str(file.relative_to(ROOT)) not in WHOLE
)
FROM_ELSEWHERE = {
    "__init__", "TransformerConfig", "config.json", "typing.Protocol", "pyproject.toml", "uv.lock", "utils", "gpu",
    "torch", "NAME", "NaN",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference: ModuleType) -> None:
    for name, text in reference.pages().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run make reference"


@cache
def definitions() -> frozenset[str]:
    """All names that the packages define: modules, classes, functions, attributes, arguments."""
    names: set[str] = set()
    for file in ROOT.glob("packages/*/src/**/*.py"):
        names |= set(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    names.add(name)
                case ast.Constant(value=str() as name) if name.isidentifier():  # such as a dataset's column
                    names.add(name)
    return frozenset(names)


@cache
def words() -> frozenset[str]:
    """Words that configurations, commands and projects define."""
    paths = [*keys(), *sections()]
    named = {*paths, *(part for path in paths for part in path.split("."))}
    named |= {word for registry in REGISTRIES for word in registry.names} | {r.group for r in REGISTRIES}
    for file in (ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text())
        named |= {project["project"]["name"], *project["project"].get("optional-dependencies", {})}
        markers = project.get("tool", {}).get("pytest", {}).get("ini_options", {}).get("markers", ())
        named |= {marker.partition(":")[0] for marker in markers}
    return frozenset(named)


def quoted(text: str) -> list[str]:
    """What stands in backticks, outside of blocks of code; `{a,b}` written out."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [name for span in spans for name in written_out(span)]


def written_out(span: str) -> list[str]:
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", span)
    return [
        "".join(chosen) for chosen in product(*(p.split(",") if i % 2 else [p] for i, p in enumerate(parts)))
    ]


def is_file(name: str) -> bool:
    folders = (ROOT, *ROOT.glob("packages/*/src"), *ROOT.glob("packages/*/src/*"))
    return any((folder / name).exists() for folder in folders)


def exists(name: str) -> bool:
    """Whether a name is a file of the project, something that its code defines, a key, or a command."""
    plain = name.partition("(")[0].strip(".")
    if re.search(r"[*…<>\"]|^path/to|^_[A-Z]+$", name) or name in FROM_ELSEWHERE or hasattr(builtins, name):
        return True
    if " " in name or name.startswith(("make", "iiverl ", ".venv", "-")):
        return is_command(name)
    if "/" in name or re.search(r"\.(py|md|json|toml|yaml|lock)$", name):
        return is_file(name) or describe(name) is not None
    return plain in words() or all(part in definitions() | words() for part in re.split(r"[.:]", plain))


def is_command(name: str) -> bool:
    """Commands of the Makefile and of iiverl have to exist; what else has spaces is an expression."""
    if name.startswith("make "):
        return bool(
            re.search(rf"^{re.escape(name.split()[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        )
    if name.startswith("iiverl "):
        return bool(
            re.search(rf"\b{re.escape(name.split()[1].replace('-', '_'))}\b", "\n".join(definitions()))
        )
    return True


@pytest.mark.parametrize("page", WHOLE)
def test_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [name for name in quoted(text) if not exists(name)]


@pytest.mark.parametrize("page", OTHERS)
def test_classes_and_modules_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    code = [n for n in quoted(text) if re.fullmatch(r"iiverl_\w+(\.\w+)+|[A-Z][a-z]+[A-Z]\w*", n)]
    assert not [name for name in code if not exists(name)]
