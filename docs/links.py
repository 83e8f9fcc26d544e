"""Links that work in the repository, as links that work in the built pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent

_LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")


def rewritten(text: str, folder: Path, page: Path, repository: str) -> str:
    """The text with links that work where it is built.

    Files outside of docs/ are links into the repository where its address is known, else downloads; then folders, and
    Markdown, are no links.

    Args:
        text: Of a page, or of a file that one includes.
        folder: What its links are relative to.
        page: The page that they come to stand on.
        repository: Address of its files.
    """

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / found["target"]))
        if not target.exists() or not target.is_relative_to(ROOT):
            return found[0]
        if not target.is_relative_to(DOCS):
            if repository:
                return f"[{found['text']}]({repository}/{target.relative_to(ROOT).as_posix()})"
            if target.is_dir() or target.suffix == ".md":
                return found["text"]
        return f"[{found['text']}]({os.path.relpath(target, page.parent)}{found['anchor'] or ''})"

    return _LINK.sub(link, text)


def on_page(app: Any, name: str, content: list[str]) -> None:
    """Rewrite the links of a page; Sphinx calls it when it has read one."""
    page = Path(app.env.doc2path(name))
    if page.suffix == ".md":
        content[0] = rewritten(content[0], page.parent, page, app.config.repository)


def on_include(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Rewrite the links of a file that a page includes."""
    file = Path(os.path.normpath(DOCS / path))
    if file.suffix == ".md":
        content[0] = rewritten(content[0], file.parent, Path(app.env.doc2path(parent)), app.config.repository)


def of_bare_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Docstrings call what they mean by its name alone: resolved where one documented object is called so."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or "." in name:
        return None
    domain = env.get_domain("py")
    found = [full for full, entry in domain.objects.items() if full.endswith(f".{name}") and not entry.aliased]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, content)
