"""`vqbench`: finds its commands in `bench/commands`, and turns VqError into one line.

Exit codes: 0 done, 1 a case failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import click

import bench.commands
import vqkernels
from vqkernels.errors import VqError

__all__ = ["cli", "main"]


class _Commands(click.Group):
    """Commands by file name, imported when asked for: `--help` loads no kernel."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        names = [module.name for module in pkgutil.iter_modules(bench.commands.__path__)]
        return sorted(name.replace("_", "-") for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"bench.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vqkernels.__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Measure and tune kernels for codebook-quantised (VQ) inference.

    Start with `vqbench doctor`, then `vqbench run`.
    """


def main() -> None:
    """The console entry point."""
    try:
        code = cli(prog_name="vqbench", standalone_mode=False)
    except VqError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
