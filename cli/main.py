"""`swarm`: the table of commands, and the one place where an error becomes a line and an exit code.

A command's module is imported when the command is used: `swarm --help` and `swarm fetch` must start at once.
"""

from __future__ import annotations

import gc

gc.disable()  # modules live to the end: looking for garbage among them is a twentieth of a `swarm fetch`'s processor time

# ruff: noqa: E402
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from cli.output import fail
from swarm import __version__
from swarm.errors import ConfigError, Interrupted, SwarmError

gc.enable()

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "daemon": ("cli.daemon:daemon", "Run a node."),
    "fetch": ("cli.fetch:fetch", "Get a file through the swarm."),
    "task": ("cli.task:task", "What the store holds: ls, show, pin, unpin, rm."),
    "image": ("cli.image:image", "Container images: pull through the swarm, list."),
    "peers": ("cli.status:peers", "Nodes this one is connected to."),
    "status": ("cli.status:status", "What the daemon says about itself."),
    "doctor": ("cli.doctor:doctor", "Find what is wrong, and say what to do."),
    "mirror": ("cli.mirror:mirror", "Container runtimes that pull through a node: configure, unconfigure."),
    "network": ("cli.network:network", "Closed networks: create, issue, revoke, show."),
    "demo": ("cli.demo:demo", "A small swarm on this machine: what it saves."),
}
"""Name to where the command is (imported when used) and its line in `swarm --help`."""


class LazyGroup(click.Group):
    """Commands by name from `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        gc.disable()
        command = getattr(importlib.import_module(module), attribute)
        gc.enable()
        assert isinstance(command, click.Command)  # noqa: S101 - the table above is ours
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; see swarm --help"
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="swarm", message="%(prog)s %(version)s")
def root() -> None:
    """Distribute container images, models and files between machines, with no centre.

    \b
    Examples:
      swarm daemon --network /etc/swarm/network --join swarm.example.com
      swarm fetch https://example.com/model.bin -o model.bin
      swarm demo

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 content did not match its digest, 4 not found at the origin,
    5 no space, 6 daemon unreachable, 7 not permitted, 8 origin unreachable or timed out, 130 interrupted.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors are one line on standard error (and an object with `--json`)."""
    as_json = "--json" in arguments
    try:
        result = root.main(args=list(arguments), prog_name="swarm", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else "swarm"
        return fail(ConfigError(f"{error.format_message().rstrip('.')} (see {command} --help)"), as_json)
    except (KeyboardInterrupt, click.Abort):
        return fail(Interrupted("interrupted"), as_json)
    except SwarmError as error:
        return fail(error, as_json)
    except BrokenPipeError:
        # Whoever read our output went away (`| head`): nothing is left to say, and the interpreter must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last resort: a person gets a line, and the traceback when asked for
        if os.environ.get("SWARM_DEBUG"):
            raise
        return fail(SwarmError(f"internal error: {type(error).__name__}: {error} (SWARM_DEBUG=1 shows where)"), as_json)


def main() -> None:
    """The `swarm` program."""
    code = run(sys.argv[1:])
    gc.freeze()  # the interpreter looks for garbage once more before it ends: a tenth of a `swarm fetch`'s processor time
    sys.exit(code)


if __name__ == "__main__":
    main()
