"""`mace`: start the server, check the environment, look at what it learns."""

from importlib.metadata import entry_points

import typer

from app.commands import adapters, demo, doctor, feedback, profile, serve, training

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("adapters")(adapters.adapters)
app.command("training")(training.training)
app.add_typer(feedback.app, name="feedback")
app.add_typer(profile.app, name="profile")


def main() -> None:
    """Entry point of the `mace` command."""
    for entry in entry_points(group="mace.commands"):  # `bench` and `simulate` stand above this package
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    app()
