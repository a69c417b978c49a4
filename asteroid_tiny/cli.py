"""The command line `asteroid-tiny`: its subcommands, each one function with options of its own.

A subcommand is a function of the parsed options behind `command`; what it needs it imports itself,
so that ``--help`` and a wrong option do not wait for it.
"""

import argparse
import sys

from .errors import exit_on_user_error

#: By name: the function that runs a subcommand, and what adds its options to a parser.
COMMANDS = {}


def command(name, add_options=None):
    """Registers a function as a subcommand; the first line of its docstring is its help.

    Args:
        name (str): Of the subcommand.
        add_options (callable, optional): Takes the `argparse.ArgumentParser` to add options to,
            and the function takes what was parsed. Without it the function takes the list of
            arguments as it stands.
    """

    def register(function):
        COMMANDS[name] = (function, add_options)
        return function

    return register


def main(argv=None):
    """Runs ``asteroid-tiny``; a `UserError` is one line on stderr and exit status 2.

    Args:
        argv (list of str, optional): What stands behind the name; that of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="asteroid-tiny", description="Tiny-Sepformer's tools.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (function, add_options) in COMMANDS.items():
        title = function.__doc__.strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=title, description=title)
        if add_options is not None:
            add_options(subparser)
        elif argv[:1] == [name]:
            with exit_on_user_error():
                return function(argv[1:])
    options = parser.parse_args(argv)
    function, _ = COMMANDS[options.command]
    with exit_on_user_error():
        function(options)


if __name__ == "__main__":
    main()
