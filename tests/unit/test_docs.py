"""The words keep to the code: links lead somewhere, files and commands that pages name exist, settings are those."""

import re
import tomllib
from collections import Counter
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from typer import Typer
from typer.main import get_command, get_group

from app.cli import app
from app.main import parse_args
from core.config import AppArgs
from scripts.configure_page import PAGES as GENERATED
from scripts.configure_page import page

ROOT = Path(__file__).parents[2]
GUIDES = ("start", "concepts", "operate", "configure", "extend", "edge")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|json|jsonl|md|png|toml))(?::(?:\w+\.)?(\w+))?`")
_COMMAND = re.compile(r"(?:^\s*|`|[$] )mace ([a-z][^`#|\n;,()]*)", re.M)
_FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"tests", "docs", "scripts"}


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


def test_pages_that_the_code_mentions_exist():
    files = [
        path
        for folder in sorted(_FOLDERS)
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    ]
    mentions = {(path, page) for path in files for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text())}
    assert {(path, page) for path, page in mentions if not (ROOT / page).exists()} == set()


@cache
def mace():
    """The `mace` command with those of packages above `app`, which `app.cli.main` adds when they are asked for."""
    group = get_group(app)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for entries, parent in (("mace.commands", group), ("mace.commands.demo", group.commands["demo"])):
        for name, target in points[entries].items():
            loaded = EntryPoint(name, target, entries).load()
            if not isinstance(loaded, Typer):
                command, loaded = loaded, Typer()
                loaded.command(name)(command)
                parent.commands[name] = get_command(loaded)
            else:
                parent.commands[name] = get_group(loaded)
    return group


def is_unknown(line):
    """Whether `mace` lacks a command or an option of this command line."""
    command, words = mace(), line.split()
    while (commands := getattr(command, "commands", None)) and words and words[0][0].isalpha():
        command = commands.get(words.pop(0))
    options = {
        name for option in getattr(command, "params", ()) for name in (*option.opts, *option.secondary_opts)
    }
    return command is None or any(word.startswith("--") and word.split("=")[0] not in options for word in words)


@pytest.mark.parametrize(("path", "text"), of_every_page(with_code=True))
def test_commands_and_options_that_a_page_shows_exist(path, text):
    assert [line for line in _COMMAND.findall(text) if is_unknown(line)] == []


GONE = {
    f"{name}.{key}"
    for name, field in AppArgs.model_fields.items()
    for key in getattr(field.annotation, "gone", ())
}


@pytest.mark.parametrize(("path", "text"), of_every_page())
def test_no_page_tells_to_use_a_setting_that_is_gone(path, text):
    today = text.partition("## Keys that are gone")[0] if path.name != "CHANGELOG.md" else ""
    assert GONE & set(re.findall(r"`(\w+\.\w+)\b", today)) == set()


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_a_generated_table_is_what_the_code_says(path):
    assert path.read_text() == page(path), "run: .venv/bin/python -m scripts.configure_page"


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


def test_the_page_on_vllms_tests_counts_what_is_expected():
    lines = (ROOT / "scripts" / "vllm_suite" / "expected.tsv").read_text().splitlines()[1:]
    kinds = Counter(tuple(line.split("\t")[:2]) for line in lines)
    titles = {
        ("pass", "pass"): "pass on both",
        ("pass", "fail"): "pass on plain vLLM only",
        ("fail", "pass"): "pass on MACE only",
        ("fail", "fail"): "fail on both",
        ("skip", "skip"): "cannot run here",
    }
    page = (ROOT / "docs" / "measurements" / "vllm_tests.md").read_text()
    table = {title: int(count) for title, count in re.findall(r"^\| ([\w ]+) \| (\d+) \|$", page, re.M)}
    assert table == {titles[kind]: count for kind, count in kinds.items()}
