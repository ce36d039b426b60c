"""The words keep to the code: links lead somewhere, files and commands that pages name exist, settings are those."""

import re
import tomllib
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.main import get_group

from app.cli import app
from app.main import parse_args
from scripts.configure_page import PAGE, page

ROOT = Path(__file__).parents[2]
GUIDES = ("start", "concepts", "operate", "configure", "extend")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|json|jsonl|md|png|toml))(?::(?:\w+\.)?(\w+))?`")
_COMMAND = re.compile(r"(?:^\s*|`|\$ )mace ((?:[a-z][a-z-]* ?){1,3})", re.M)
_GROUPS = ("bench", "profile", "feedback")
"""Commands that do nothing without a subcommand."""
_FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"state", "build"}


def of_every_page(*, with_code=False):
    texts = [(path, path.read_text()) for path in PAGES]
    return [
        pytest.param(path, text if with_code else _FENCE.sub("", text), id=str(path.relative_to(ROOT)))
        for path, text in texts
    ]


def anchors_of(path):
    """The ids that mkdocs gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text()), re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def is_broken(path, target):
    """Whether a relative link of a page leads nowhere."""
    name, _, anchor = target.partition("#")
    linked = (path.parent / name).resolve() if name else path
    return not linked.exists() or (anchor and anchor not in anchors_of(linked))


@pytest.mark.parametrize(("path", "text"), of_every_page())
def test_links_lead_to_pages_and_headings(path, text):
    targets = [target for target in _LINK.findall(text) if not re.match(r"\w+:", target)]
    assert [target for target in targets if is_broken(path, target)] == []


def is_missing(name, symbol):
    """Whether a file of ours is not there, or does not define the name."""
    if name.partition("/")[0] not in _FOLDERS:
        return False  # a user's file
    if not (ROOT / name).exists():
        return True
    return symbol and not re.search(
        rf"\b(?:def|class) {symbol}\b|^\s*{symbol}\b.*=", (ROOT / name).read_text(), re.M
    )


@pytest.mark.parametrize(("path", "text"), of_every_page())
def test_files_and_names_that_a_page_mentions_exist(path, text):
    assert [(name, symbol) for name, symbol in _FILE.findall(text) if is_missing(name, symbol)] == []


@cache
def known_commands():
    """Every `mace` command with its subcommands, those of packages above `app` included."""
    known = {name: set(getattr(command, "commands", ())) for name, command in get_group(app).commands.items()}
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for name, target in points["mace.commands"].items():
        loaded = EntryPoint(name, target, "mace.commands").load()
        known[name] = set(get_group(loaded).commands) if isinstance(loaded, Typer) else set()
    known["demo"] |= points["mace.commands.demo"].keys()
    return known


@pytest.mark.parametrize(("path", "text"), of_every_page(with_code=True))
def test_commands_that_a_page_shows_exist(path, text):
    known = known_commands()
    unknown = []
    for words in _COMMAND.findall(text):
        first, *more = words.split()
        if first not in known or (more and first in _GROUPS and more[0] not in known[first]):
            unknown.append(words)
    assert unknown == []


def test_the_page_of_settings_is_what_the_settings_say():
    text = PAGE.read_text()
    assert text == page(text), "run: .venv/bin/python -m scripts.configure_page"


@pytest.mark.parametrize("name", ["docs/start.md", "docs/configure.md", "docs/operate.md"])
def test_settings_shown_as_yaml_are_valid(name):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    documents = [yaml.safe_load(block) for block in blocks]
    assert documents
    for document in documents:
        if document.keys() != {"deployments"}:  # Serve's own
            parse_args(document.get("args", document))


def test_the_guides_stay_readable_in_an_afternoon():
    assert sum(len((ROOT / "docs" / f"{name}.md").read_text().split()) for name in GUIDES) <= 18_000
