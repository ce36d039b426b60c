import pytest
import typer
from typer.testing import CliRunner

from app.commands import demo
from app.demo import run, taste

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def mace():
    """`mace` with the demo and a sub-command, attached as `app.cli` does it."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(demo.demo)
    group.command("drift")(lambda: typer.echo("drifted"))
    app = typer.Typer()
    app.add_typer(group, name="demo")
    app.command("other")(lambda: None)
    return lambda *arguments: CliRunner().invoke(app, ["demo", *arguments])


def test_the_demo_runs_without_a_sub_command(mace, monkeypatch):
    seen = []

    async def remember(options, say):
        seen.append(options)
        raise taste.DemoError("enough")

    monkeypatch.setattr(run, "run_demo", remember)
    result = mace("--preferences", "7", "--taste", "polite", "--taste", "terse", "--url", UNREACHABLE)
    assert result.exit_code == 1
    assert "enough" in result.output
    assert (seen[0].preferences, seen[0].tastes, seen[0].base_url) == (7, ("polite", "terse"), UNREACHABLE)


def test_a_sub_command_runs_instead_of_the_demo(mace):
    result = mace("drift")
    assert (result.exit_code, result.output) == (0, "drifted\n")


def test_a_plot_shows_what_was_learnt_and_when(mace, monkeypatch, tmp_path):
    answer = {"sent_s": 2.0, "ttft_ms": 140.0, "gap_p50_ms": 40.0, "gap_max_ms": 210.0}
    silent = {"sent_s": 9.0, "ttft_ms": None, "gap_p50_ms": None, "gap_max_ms": None}
    numbers = {"p50": 1.0, "p99": 2.0, "max": 3.0}
    timings = {"requests": 2, "failed": 0, "ttft_ms": numbers, "tbt_ms": numbers, "answers": [answer, silent]}
    phase = {
        "taste": "brief",
        "preferences": 60,
        "before": {"right": None},
        "after": {"right": None},
        "share_before": 0.03,
        "share_after": 0.97,
        "live_before": "base",
        "live_after": "v0001",
        "learnt_after_s": 150.0,
        "training": {"versions": [{"version": "v0001", "after_s": 120.0}]},
        "targets_ms": {"ttft": 2000.0, "tbt": 250.0},
        "while_learning": timings,
        "abilities": {"right": 0.44},
    }
    report = {"abilities": {"right": 0.45}, "without_learning": timings, "phases": [phase], "examples": []}

    async def made(options, say):
        return report

    monkeypatch.setattr(run, "run_demo", made)
    path = tmp_path / "demo.svg"
    result = mace("--plot", str(path))
    assert result.exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert text.count('<g id="patch_') >= 2 * 2 + 2  # bars of two measures, before and after, and two frames
    result = mace("--json", "--plot", str(tmp_path / "absent" / "demo.png"))
    assert result.exit_code == 1
    assert "cannot write plot" in result.output
    assert '"live_after": "v0001"' in result.output  # the report is not lost with it
