"""How the table of trials judges what a trial prints; the trials themselves are not part of the repository."""

import re
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def trials():
    loader = SourceFileLoader("trials", str(SCRIPTS / "trials"))
    module = module_from_spec(spec_from_loader("trials", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("trial", "output", "reason", "now"),
    [
        ({}, "ok   a\nok   b\n", "", "ok (2)"),
        ({}, "ok   a\nLOOK b (1)\n", "", "LOOK: b (1)"),
        ({"right": {r"^b \(": "b may be so"}}, "ok   a\nLOOK b (1)\n", "", "ok (2); b may be so"),
        ({"must": ["^exit 0"]}, "exit 0\n", "", "ok (1)"),
        ({"must": ["^exit 0"]}, "it was\nexit 1\n", "", "LOOK: not seen: ^exit 0"),
        ({}, "Traceback (most recent call last)\n", "", "LOOK: seen: Traceback"),
        ({"never": [" 5.. "]}, "a 500 \n", "", "LOOK: seen:  5.. "),
        ({}, "ok   a\n", "took longer than 3 s", "LOOK: took longer than 3 s"),
        ({}, "", "needs cc", "not run: needs cc"),
    ],
)
def test_what_a_trial_prints_is_judged(trials, trial, output, reason, now):
    assert trials.judge(trial, output, reason) == now


def test_the_table_has_a_row_for_each_trial_in_order_run_or_not(trials):
    known = tomllib.loads((SCRIPTS / "trials.toml").read_text(encoding="utf-8"))
    rows = trials.table(known, {"a2": {"now": "ok (5)"}}).splitlines()[2:]
    assert len(rows) == len(known)
    names = [row.split("|")[1].strip() for row in rows]
    numbered = [name for name in names if re.fullmatch(r"[a-h]\d+", name)]
    assert len(numbered) == 34
    assert numbered == sorted(numbered, key=lambda name: (name[0], int(name[1:]))) == names[:34]
    assert rows[0].endswith("| ok (5) |")
    assert rows[1].endswith("| not run: not asked for |")


def test_each_trial_can_be_run(trials):
    for name, trial in tomllib.loads((SCRIPTS / "trials.toml").read_text(encoding="utf-8")).items():
        assert {"tries", "run"} <= trial.keys() <= {
            "tries", "before", "run", "must", "never", "right", "note", "server", "limit_s", "needs"
        }, name  # fmt: skip
        for pattern in (*trial.get("must", ()), *trial.get("never", ()), *trial.get("right", {})):
            re.compile(pattern)
