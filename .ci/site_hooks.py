"""The site's hook: brings in pages that live outside docs/, and turns links to where things lie on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARD = "src/latentkv/assets/default"
BROUGHT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
    "examples/README.md": "examples.md",
    f"{CARD}/README.md": "embedded-model.md",
    f"{CARD}/training/loss.png": "images/embedded-loss.png",
    **{
        f"examples/{path.name}": f"examples/{path.name}"
        for path in (ROOT / "examples").iterdir()
        if path.stem != "README"
    },
}
"""Files of the repository, and where they are on the site; what is in docs/ lies at its top."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Bring in what lies outside docs/."""
    for source, place in BROUGHT.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; one to what is not on the site is text."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()
    folder = posixpath.dirname(source)

    def turned(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        path = f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path
        place = path.removeprefix("docs/") if path.startswith("docs/") else BROUGHT.get(path)
        if place is None and (ROOT / path).exists():
            return text
        return f"{image}[{text}]({place or target}{anchor or ''})"

    return _LINK.sub(turned, markdown)
