"""A hook of mkdocs: README, CONTRIBUTING and CHANGELOG become pages of the site, as they are.

Links in documents are those of the repository, so that they work there; here they are turned into those of the site. What they
lead to outside docs/ (an image, the licence) is copied into it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = "" if here in PAGES.values() else posixpath.join("docs", posixpath.dirname(here))

    def link(match: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / name).is_file():  # a web page; or an error, which mkdocs reports
            return match[0]
        target = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{match[2]})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*|)\)", link, markdown)
