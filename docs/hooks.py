"""What mkdocs does with our pages besides rendering them, so that they read well in the repository, too.

- The Markdown files at the top of the repository and that of examples/ are pages. README.md is the first one, index.md.
- A link to another file of the repository leads to a copy of it in the site.
- `$...$` and blocks of the language `math` become MathML. Browsers draw it, no script is loaded.
- Blocks of the language `help` show what the command in them prints.
"""

import contextlib
import io
import os
import posixpath
import re
import shlex
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.superfences import SuperFencesException

ROOT = Path(__file__).parents[1]
PAGES = {path.name: f"{path.stem.lower()}.md" for path in ROOT.glob("*.md")} | {"README.md": "index.md"}
PAGES |= {f"examples/{path.name}": "examples.md" for path in ROOT.glob("examples/README.md")}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()[^)#:\s]+|(?<=\bsrc=\")[^\":]+|(?<=\bsrcset=\")[^\":]+")  # without the anchor; not a URL
SHOWN = (".json", ".png", ".svg")  # by browsers; other files become .txt
FORMULA = r"(?<![\\\w$])\$(?=\S)([^$]+?)(?<=\S)\$(?![\w$])"
WIDTH = "100"  # columns of help


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds what renders formulas and help."""
    config.markdown_extensions.append(Formulas())
    fences = [
        {"name": "math", "class": "math", "format": display},
        {"name": "help", "class": "help", "format": printed},
    ]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links that leave docs/, or are in a page from outside it, lead to pages and files of the site.

    A link to a file that does not exist stays as it is: a strict build then fails, and names it.
    """
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[0]))  # from the repository's top
        if not (ROOT / target).is_file():
            return match[0]
        inside = PAGES.get(target) or (target[5:] if target.startswith("docs/") else f"files/{target}")
        if files.get_file_from_path(inside) is None:
            copy = File.generated(config, inside, abs_src_path=str(ROOT / target))
            copy.dest_uri += "" if target.endswith(SHOWN) else ".txt"
            files.append(copy)
        return posixpath.relpath(inside, posixpath.dirname(here) or ".")

    return LINK.sub(moved, text)


def mathml(formula: str, display: str) -> str:
    """A formula in LaTeX as MathML. Raises SuperFencesException for a command that latex2mathml does not know."""
    made = convert(formula, display=display)
    if "\\" in made or "<mi>&</mi>" in made:
        raise SuperFencesException(f"latex2mathml cannot convert {formula!r}")
    return made


def display(source: str, *_: Any, **__: Any) -> str:
    """A block of the language `math`: one formula."""
    return f'<div class="math">{mathml(source, "block")}</div>'


def printed(source: str, *_: Any, **__: Any) -> str:
    """A block of the language `help`: a command of vjvcr-fast, and below it what it prints."""
    from vjvcr_fast.cli import main

    os.environ["COLUMNS"] = WIDTH
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(shlex.split(source)[1:])
    if not out.getvalue():
        raise SuperFencesException(f"{source!r} prints nothing")
    text = out.getvalue().replace("&", "&amp;").replace("<", "&lt;")
    return f'<div class="highlight"><pre><code>{text}</code></pre></div>'


class Formulas(Extension):
    """`$...$` within a paragraph or a table."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.inlinePatterns.register(_Formula(FORMULA, md), "formula", 185)  # after code, before backslashes


class _Formula(InlineProcessor):
    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802
        return self.md.htmlStash.store(mathml(match[1], "inline")), match.start(0), match.end(0)
