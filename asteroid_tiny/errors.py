"""The one exception for what a user can mend, and how a command line shows it.

Anything wrong with a file, a folder, an option or an argument that came from outside raises
`UserError` with one sentence that names the thing and says what to do. Library users catch it as
a `ValueError`; command lines print the sentence and leave with status 2.
"""

import contextlib
import sys


class UserError(ValueError):
    """Something that the user supplied is wrong; the message is one sentence that says what."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turns a `UserError` into one line on stderr and exit status 2 (for command lines)."""
    try:
        yield
    except UserError as error:
        sentence = str(error).splitlines()[-1]  # a data loader's worker wraps it in a traceback
        sentence = sentence.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
