"""The one exception for what a user can mend, and how a command line shows it.

Anything wrong with a file, a folder, an option or an argument that came from outside raises
`UserError` with one sentence that names the thing and says what to do. Library users catch it as
a `ValueError`; command lines print the sentence and leave with status 2.
"""

import contextlib
import sys


class UserError(ValueError):
    """Something that the user supplied is wrong; the message is one sentence that says what."""


def sentence(error):
    """The sentence of a `UserError`, which a data loader's worker wraps in a traceback (str)."""
    told = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
    return told.removesuffix("\n")  # of the traceback


def printable(words):
    """One line of what came from outside, without codes that a terminal would obey (str).

    Examples:
        >>> printable("mit\\x1b[2J\\n licence")
        'mit?[2J licence'
    """
    return without_codes(" ".join(str(words).split()))


def without_codes(text):
    """Words of which some may come from outside, as one line that a terminal can show (str)."""
    return "".join(c if c.isprintable() else "?" for c in text)


@contextlib.contextmanager
def stopped_in_one_line():
    """Makes Ctrl-C in the block, if nobody catches it, the line "stopped"; it ends the process."""
    show = sys.excepthook

    def tell(kind, *error):
        if kind is KeyboardInterrupt:
            print("stopped", file=sys.stderr)
        else:
            show(kind, *error)

    sys.excepthook = tell
    yield  # what is raised here is shown when the block is long left: the hook stays for it
    sys.excepthook = show


@contextlib.contextmanager
def exit_on_user_error():
    """Turns a `UserError` into one line on stderr and exit status 2 (for command lines).

    Ctrl-C is the line "stopped" and status 130, as of programs that end by it.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        told = without_codes(sentence(error))  # it may quote others; blanks in paths stay
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
