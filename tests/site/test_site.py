"""The built documentation: no link inside it leads nowhere, and every page fits a phone. ``make docs`` runs this."""

from __future__ import annotations

import re
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_build" / "html"
# Not the source listings: their links back are Sphinx's, and name a class by its module where the page does not.
PAGES = sorted(path for path in SITE.rglob("*.html") if "_modules" not in path.parts)
PHONE = {"width": 390, "height": 844}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors = {""}
        self.unnamed: list[str] = []  # pictures without a text in their place
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.anchors.update(value for name, value in attrs if name in ("id", "name") and value)
        link = known.get("src" if tag in ("img", "script", "iframe", "source") else "href")
        if link and not link.startswith("data:"):
            self.links.append(link)
        if tag == "img" and "alt" not in known:
            self.unnamed.append(str(known.get("src")))


page = cache(Page)


def broken(source: Path, link: str) -> bool:
    """Whether a link to another place in this project leads nowhere."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = source if not parts.path else source.parent / unquote(parts.path)
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    return target.suffix == ".html" and SITE in target.parents and unquote(parts.fragment) not in page(target).anchors


def test_the_site_is_built():
    assert (SITE / "index.html") in PAGES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_links_and_pictures(path):
    assert [link for link in page(path).links if broken(path, link)] == []
    assert page(path).unnamed == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_files_that_are_read_in_the_repository(name):
    text = (ROOT / name).read_text("utf-8")
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if broken(ROOT / name, link)] == []


@pytest.fixture(scope="module")
def phone():
    """A page of a browser as wide as a phone."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport=PHONE)
        browser.close()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_a_phone_shows_it_without_scrolling_sideways(phone, path):
    phone.goto(path.as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    pictures = "[...document.images].map(one => (one.loading = 'eager', one.decode().then(() => '', () => one.src)))"
    assert not any(phone.evaluate(f"Promise.all({pictures})"))
