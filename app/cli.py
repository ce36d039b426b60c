"""`mace`: start the server, check the environment, look at what it learns."""

import sys
from importlib.metadata import entry_points

import typer

from app.commands import adapters, demo, doctor, drift, feedback, profile, serve, training

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(demo.app, name="demo")
app.command("drift")(drift.drift)
app.command("adapters")(adapters.adapters)
app.command("training")(training.training)
app.add_typer(feedback.app, name="feedback")
app.add_typer(profile.app, name="profile")


def main() -> None:
    """Entry point of the `mace` command."""
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    for depth, (group, parent) in enumerate((("mace.commands", app), ("mace.commands.demo", demo.app))):
        for entry in entry_points(group=group):  # commands of packages above this one
            if len(words) > depth and words[depth] != entry.name:
                continue  # importing what is not asked for takes seconds
            command = entry.load()
            if isinstance(command, typer.Typer):
                parent.add_typer(command, name=entry.name)
            else:
                parent.command(entry.name)(command)
    app()
