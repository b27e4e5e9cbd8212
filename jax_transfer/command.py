"""The command `jax-transfer NAME ...`, which runs the command of a name. It imports only what that command needs."""

import sys
from collections.abc import Callable, Sequence

USER_ERROR = 2


def _trust(arguments: list[str]) -> None:
    """Says how far the scores in a table can be trusted, and whether they earn their cost."""
    from jax_transfer.trust.command import main

    main(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"trust": _trust}


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names, with the other arguments; lists the commands with --help.

    >>> run(["--help"])
    usage: jax-transfer COMMAND ...
    <BLANKLINE>
      trust      Says how far the scores in a table can be trusted, and whether they earn their cost.
    <BLANKLINE>
    jax-transfer COMMAND --help describes a command.
    """
    name, *rest = arguments or sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        COMMANDS[name](rest)
    elif name in ("-h", "--help"):
        listed = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
        print(f"usage: jax-transfer COMMAND ...\n\n{listed}\n\njax-transfer COMMAND --help describes a command.")
    else:
        print(f"jax-transfer: there is no command {name!r}; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(USER_ERROR)
