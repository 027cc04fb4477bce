"""The documentation site: links, formulas and the API's names when it is built; its pages in a browser."""

import contextlib
import functools
import http.server
import importlib
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = ["index.html", "math.html", "api/losses.html", "benchmarks.html"]
WIDTHS = [1300, 400]

# Loads pages in frames of each width. Leaves in the document: the title, by how many pixels the page is too wide, and
# how many files were asked of other hosts.
PROBE = """<!doctype html><title>probe</title><link rel="icon" href="data:,"><script>
for (const page of PAGES) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.onload = () => {
    const seen = frame.contentDocument, too_wide = seen.documentElement.scrollWidth - width;
    const files = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
    const elsewhere = files.filter(name => /^http/.test(name) && !name.startsWith(location.origin + "/"));
    document.body.append(`<${page} ${width}: ${seen.title}; ${too_wide} ${elsewhere.length}>`);
  };
  frame.src = page;
  document.addEventListener("DOMContentLoaded", () => document.body.append(frame));
}
</script><body></body>"""


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    for package in ("material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package}: the extra docs is not installed")


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = r"<(?:script|link|img|iframe|source|video|use)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]*)"
    loads += r"|(?:@import\s*|url\()[\s\"']*((?:https?:)?//[^\s\"')]*)"
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert re.findall(loads, page.read_text()) == [], page


@pytest.mark.slow
def test_every_formula_is_mathml(site: Path) -> None:
    source = (ROOT / "docs" / "math.md").read_text()
    displayed = source.count("```math\n")
    inline = re.sub(r"^```.*?^```$|`[^`\n]*`", "", source, flags=re.DOTALL | re.MULTILINE).count("$") // 2
    page = (site / "math.html").read_text()
    assert (page.count('display="block"'), page.count('display="inline"')) == (displayed, inline)
    assert displayed > 10
    assert inline > 50


@pytest.mark.slow
@pytest.mark.parametrize("module", ["losses", "latents", "data"])
def test_every_public_name_is_on_its_page(site: Path, module: str) -> None:
    package, page = importlib.import_module(f"vjvcr_fast.{module}"), (site / "api" / f"{module}.html").read_text()
    names = [name for name in package.__all__ if getattr(getattr(package, name), "__doc__", None)]
    defined = [name for name in names if getattr(package, name).__module__.startswith("vjvcr_fast.")]
    assert [name for name in defined if f'id="vjvcr_fast.{module}.{name}"' not in page] == []


@pytest.mark.slow
def test_every_command_is_on_its_page(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vjvcr_fast", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = re.findall(r"^    (\w+) ", done.stdout, re.MULTILINE)
    page = (site / "api" / "command-line.html").read_text()
    assert "train" in commands
    assert [name for name in commands if not re.search(rf"usage: vjvcr-fast {name}\b", page)] == []


@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails(tmp_path: Path) -> None:
    """From a page in docs/ and from the README, to a file, a heading, and out of docs/."""
    (tmp_path / "docs").mkdir()
    for name in ("hooks.py", "site.css"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    (tmp_path / "README.md").write_text("# Start\n\n[a](docs/page.md#none) [b](docs/none.md)\n")
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n[c](../none.py) [d](none.md) [e](../README.md)\n")
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"^nav:\n(?: .*\n)+", "", config, flags=re.MULTILINE))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    found = re.findall(r"^WARNING -  Doc file '(\S+)' contains a link '(\S+?)'", done.stderr, re.MULTILINE)
    assert sorted(found) == [
        ("index.md", "docs/none.md"),
        ("index.md", "page.md#none"),
        ("page.md", "../none.py"),
        ("page.md", "none.md"),
    ]


class Handler(http.server.SimpleHTTPRequestHandler):
    missing: ClassVar[list[str]] = []  # the files that were asked for and are not there

    def log_error(self, *_: object) -> None:
        self.missing.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder's pages on this machine."""
    Handler.missing.clear()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def look(folder: Path, pages: list[str], profile: Path, title: str) -> None:
    """Loads pages of a folder in a browser: no error in the console, no file missing or from elsewhere, no page wider
    than a desktop or a phone. profile: an empty folder. title: what each page's title has in it. May skip the test."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium: apt install chromium")
    (folder / "probe.html").write_text(PROBE.replace("of PAGES", f"of {pages}").replace("of WIDTHS", f"of {WIDTHS}"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--enable-logging=stderr"]
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with served(folder) as address:
        command = [browser, *options, offline, "--virtual-time-budget=20000", "--dump-dom", f"{address}/probe.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert Handler.missing == []
    assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
    seen = re.findall(r"&lt;(\S+) (\d+): ([^;]+); (-?\d+) (\d+)&gt;", done.stdout)
    assert {(page, int(width)) for page, width, *_ in seen} == {(page, width) for page in pages for width in WIDTHS}
    for page, width, shown, too_wide, elsewhere in seen:
        assert title in shown, (page, shown)
        assert elsewhere == "0", f"{page} loads {elsewhere} files from elsewhere"
        assert int(too_wide) <= 0, f"{page} is {too_wide} pixels wider than a window of {width}"


@pytest.mark.slow
def test_pages_in_a_browser(site: Path, tmp_path: Path) -> None:
    look(site, SHOWN, tmp_path, "vjvcr_fast")
