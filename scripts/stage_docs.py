"""Copy what the documentation site is built from to `build/docs`, or to the folder that is named: `make docs`.

Pages keep their place in the repository, so that the same links work in a checkout, on a forge and on the site. Files
that a page links to come along, and links to folders lead to the README of the folder.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md",
    "docs/*.md",
    "examples/*/README.md",
    "benchmarks/README.md",
    "packages/iiverl-reward-client/README.md",
)
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]*)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def main(stage: Path) -> None:
    """Write the folder again from what is in the repository."""
    shutil.rmtree(stage, ignore_errors=True)
    chosen = pages()
    for page in chosen:
        text = page.read_text(encoding="utf-8")
        for _, target in links(text):
            linked = (page.parent / target).resolve()
            if target and linked.is_file() and linked not in chosen:
                _write(stage, linked, linked.read_bytes())
        _write(stage, page, to_readmes(page, text).encode("utf-8"))


def pages() -> list[Path]:
    """List the pages of the site."""
    return sorted(page for pattern in PAGES for page in ROOT.glob(pattern))


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield the links of a page to files: the whole link, and the path that it leads to, empty for its own page."""
    for match in LINK.finditer(CODE.sub("", text)):
        if not re.match(r"\w+:", match[2]):
            yield match[0], match[2]


def to_readmes(page: Path, text: str) -> str:
    """Let links to folders lead to the README there."""

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        if target and not re.match(r"\w+:", target) and (page.parent / target / "README.md").is_file():
            target = f"{target.rstrip('/')}/README.md"
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    return LINK.sub(replace, text)


def _write(stage: Path, file: Path, content: bytes) -> None:
    target = stage / file.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")
