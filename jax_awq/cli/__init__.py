"""The command line, one module a command."""

import typer

from jax_awq.cli.generate import generate
from jax_awq.cli.inspect import inspect
from jax_awq.cli.verify import HELP, verify

app = typer.Typer(
    help="AWQ 4-bit checkpoints in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(inspect)
app.command(help=HELP)(verify)
