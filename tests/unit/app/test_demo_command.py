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
