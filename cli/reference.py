"""`docs/reference/cli.md`, from the commands themselves: `python -m cli.reference > docs/reference/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from cli.main import root

HEAD = """\
# Command line

Written from the commands by `python -m cli.reference`; a test fails when the two differ.

`swarm fetch` and the commands about tasks and peers talk to the daemon of the data directory through its control socket
(`<data dir>/control.sock`, mode 0600: whoever may open it is the node's administrator). Without a daemon, `swarm fetch`
runs a node itself, on free ports, with the same store, and opens the socket while it lives: a second command joins it.

Every error is one line on standard error; with `--json` an object `{"error", "message", "exit_code"}` goes to standard
output too. [Exit codes](exit-codes.md) are the same for all commands. `swarm fetch --json` ends with one object:

```json
{"task": "...", "digest": "sha256:...", "bytes": 9, "seconds": 0.1, "from_origin": 9, "from_peers": 0, "from_local": 0,
 "path": "out"}
```

`bytes` is what was written; `seconds` is the node's own, from the request to complete and verified; the other three say
where the content came from. With `--range`, `digest` is that of the whole content only once all of it is here.
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for context in _contexts(root, "swarm", None):
        parts.append(f"## `{context.command_path}`\n\n```text\n{context.get_help().rstrip()}\n```\n")
    return "\n".join(parts)


def _contexts(command: click.Command, name: str, parent: click.Context | None) -> Iterator[click.Context]:
    context = command.make_context(
        name, [], parent=parent, resilient_parsing=True, terminal_width=110, help_option_names=["-h", "--help"]
    )
    yield context
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            child = command.get_command(context, inner)
            if child is not None:
                yield from _contexts(child, inner, context)


if __name__ == "__main__":
    print(reference(), end="")
