"""Writes the tables of docs/configure.md and docs/vllm_flags.md from the code, between their two markers.

`.venv/bin/python -m scripts.configure_page` rewrites the pages; a test compares them with what this would write.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from core.alignment_config import Section
from core.config import AppArgs
from engine.vllm.flags import ENGINE, FLAGS

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- generated from the settings: begin -->\n"
END = "<!-- generated from the settings: end -->\n"


def page(path: Path) -> str:
    """The page of `PAGES` as it stands in the file, with its generated part made anew."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{PAGES[path]()}\n{END}{after}"


def tables() -> str:
    """One heading and table for each section of `AppArgs`, then the keys that are gone."""
    served = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]["args"]
    parts, top, gone = [], [], []
    for name, field in AppArgs.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            top.append(_row(name, field, _docs(AppArgs).get(name, ""), served.get(name)))
            continue
        docs, here = _docs(section), served.get(name, {})
        rows = [
            _row(f"{name}.{key}", inner, docs.get(key, ""), here.get(key))
            for key, inner in section.model_fields.items()
        ]
        parts += [f"## {name}", "", _markdown(inspect.getdoc(section) or ""), "", *_HEAD, *rows, ""]
        gone += [f"| `{name}.{key}` | {_markdown(text)} |" for key, text in sorted(section.gone.items())]
    parts += ["## Beside the sections", "", *_HEAD, *top, ""]
    parts += [
        "## Keys that are gone",
        "",
        "Such a key is refused with this text.",
        "",
        "| key | |",
        "|---|---|",
        *gone,
        "",
    ]
    return "\n".join(parts)


_HEAD = ("| setting | default | values | meaning |", "|---|---|---|---|")


def _row(name: str, field: FieldInfo, doc: str, here: Any) -> str:
    default = _literal(field.get_default(call_default_factory=True))
    changed = "" if here is None or _literal(here) == default else f", here {_literal(here)}"
    return f"| `{name}` | {default}{changed} | {_values(field)} | {_markdown(doc)} |"


def _literal(value: Any) -> str:
    """The value as one would write it in YAML."""
    text = str(value) if isinstance(value, str | Path) else json.dumps(value)
    return f"`{text}`"


def _values(field: FieldInfo) -> str:
    """The choices, or the type's name with its bounds."""
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    if get_origin(field.annotation) is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    return ", ".join([" or ".join(names[kind] for kind in kinds), *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    for rule in field.metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (bound := getattr(rule, name, None)) is not None:
                yield f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}"
        if pattern := getattr(rule, "pattern", None):
            yield f"`{pattern}`"


def _docs(section: type[Section]) -> dict[str, str]:
    """The docstring under each field."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(cls, ast.ClassDef)
    docs = {}
    for field, text in zip(cls.body, cls.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = inspect.cleandoc(str(text.value.value))
    return docs


def _markdown(text: str) -> str:
    """A docstring on one line of a table, with YAML's words for Python's, and links to pages."""
    for python, yaml_word in (("None", "`null`"), ("True", "`true`"), ("False", "`false`")):
        text = re.sub(rf"\b{python}\b", yaml_word, text)
    text = re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", text)
    return " ".join(text.split()).replace("|", "\\|")


def flags() -> str:
    """One row for each of vLLM's arguments that MACE has something to say of."""
    rows = []
    for flag in FLAGS:
        names = ", ".join(f"`{name}`" for name in flag.names)
        tried = f"`{json.dumps(flag.example)}`" if flag.example else f"not run: {flag.not_run}"
        section = "" if flag.section == ENGINE else f" (`{flag.section}`)"
        rows.append(f"| {names}{section} | {flag.effect} | {_markdown(flag.why)} | {tried} |")
    return "\n".join(["| argument | here | what to know | what the test starts |", "|---|---|---|---|", *rows, ""])


PAGES = {ROOT / "docs" / "configure.md": tables, ROOT / "docs" / "vllm_flags.md": flags}

if __name__ == "__main__":
    for one in PAGES:
        one.write_text(page(one))
