"""The ``rheostat`` command: joins the server's commands and the training package's."""

import sys

import typer

from models.errors import RheostatError
from server import commands as server_commands
from server.lifetime import follow_parent
from training import category_commands, evaluation_command
from training import commands as training_commands

# vLLM spawns its engine and its workers, and a spawned process imports this module again.
follow_parent()

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serve one language model with a refusal dial per category and request.",
    epilog="To see it work: rheostat demo. For a checkpoint of your own: rheostat train, then "
    "calibrate, then serve. `rheostat COMMAND --help` explains a command.",
)
app.add_typer(server_commands.app)
app.add_typer(training_commands.app)
app.add_typer(evaluation_command.app)
app.add_typer(category_commands.app)


def main() -> None:
    """Runs the command line; an error raised on purpose is one line and exit status 1."""
    try:
        app(prog_name="rheostat")
    except RheostatError as error:
        typer.echo(f"rheostat: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
