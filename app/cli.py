"""`mace`: start the server, check the environment, look at what it learns."""

import typer

from app.commands import adapters, demo, doctor, feedback, serve, training

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.command("adapters")(adapters.adapters)
app.command("training")(training.training)
app.add_typer(feedback.app, name="feedback")


def main() -> None:
    """Entry point of the `mace` command."""
    app()
