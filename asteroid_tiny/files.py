"""Files and folders that appear whole or not at all: write beside, flush to disk, then rename."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from .errors import UserError, printable

LEFT = re.compile(r"\..{0,30}\.[0-9a-f]{8}\.[0-9]+\.part(\..*)?", re.DOTALL)
AN_HOUR = 3600  # s


@contextlib.contextmanager
def whole_file(path):
    """Gives a temporary path beside `path`, which takes its place once the block has ended well.

    A reader sees the old file or the new one, never a part; a process killed inside the block
    leaves the old file as it was.

    Args:
        path (str or Path): The file to write. Its folder is made if there is none.

    Yields:
        Path: Where to write. The suffix is that of `path`, so that writers that look at it work.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.

    Examples:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes" / "a.txt"
        >>> with whole_file(target) as part:
        ...     _ = part.write_text("all of it")
        >>> target.read_text()
        'all of it'
    """
    path = Path(path)
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]  # as names may be long already
    part = path.with_name(f".{path.stem[:30]}.{mark}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        flush(part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} could not be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # there is none, or its folder is none
            part.unlink()


def flush(path):
    """Returns once a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sweep(folder):
    """Deletes what `whole_file` left in a folder when its process was killed, an hour ago or more.

    Younger ones may be another process's at work, on another machine for all we know.
    """
    with contextlib.suppress(OSError):
        for part in Path(folder).iterdir():
            with contextlib.suppress(OSError):  # another process was faster, or it is a folder
                if LEFT.fullmatch(part.name) and time.time() - part.stat().st_mtime > AN_HOUR:
                    part.unlink()


@contextlib.contextmanager
def alone(folder, does):
    """Keeps other processes out that ask for the same, until the block or this process ends.

    Args:
        folder (str or Path): A folder that exists. A file ``.lock`` stays in it.
        does (str): What the process does there, for the error.

    Raises:
        UserError: If another process is at it.
    """
    path = Path(folder) / ".lock"
    try:
        file = open(path, "w")
    except OSError as error:
        raise UserError(f"{path} could not be written: {reason(error)}") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which processes forked do not share
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another process {does} in {folder}; wait for its end, or stop it"
                ) from None  # else the file system has no locks
        yield


def make_folder(path):
    """Makes a folder, and those above it, where there is none.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be made: {reason(error)}") from None


@contextlib.contextmanager
def temporary_folder(prefix=None):
    """As `tempfile.TemporaryDirectory`.

    Raises:
        UserError: If it cannot be made.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:  # of all the folders that are tried
        raise UserError(
            f"no temporary folder can be made ({error}); set TMPDIR to a folder on a disk with room"
        ) from None
    with made as folder:
        yield folder


@contextlib.contextmanager
def whole_folder(path):
    """As `whole_file`, for a folder with all that is in it: gives one that replaces `path`.

    Args:
        path (Path): The folder; its parent exists.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed and had our number
    try:
        with _turn(path.parent):
            _sweep_beside(path)
        part.mkdir()
        yield part
        for name in part.rglob("*"):
            if name.is_file():
                flush(name)
        with _turn(path.parent):
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            try:
                part.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path} could not be written: {reason(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _turn(folder):
    """Lets one process after the other replace what is in a folder."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # processes forked meanwhile hold it, too
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _sweep_beside(path):
    """Deletes what `whole_folder` left beside a folder when its process was killed.

    Of parts those of an hour ago or more. The old folder comes back where there is no new one.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.(part|old)")
    for folder in path.parent.iterdir():
        if not left.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):  # another process was faster
            if folder.suffix == ".old" and not path.exists():
                folder.rename(path)
            elif folder.suffix == ".old" or time.time() - folder.stat().st_mtime > AN_HOUR:
                shutil.rmtree(folder, ignore_errors=True)


def reason(error):
    """The reason of an `OSError` in words a user can act on."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; free some space and run the same command again"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "a file is in the place of a folder"
    return error.strerror or str(error)


def read_json(path, shape, hint):
    """The content of a JSON file that this package wrote, and others may have changed since.

    Args:
        path (str or Path): The file.
        shape: What it must hold: a type, some of them in a tuple, a list of one shape that all
            items have, or a dictionary with the shapes of some keys.
        hint (str): What makes it anew.

    Raises:
        UserError: If it is missing, no JSON, or holds something else.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> _ = path.write_text('{"steps": [1, 2]}')
        >>> read_json(path, {"steps": [int]}, "train again")
        {'steps': [1, 2]}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({printable(error)}); delete it and {hint}") from None
    if not has_shape(content, shape):
        raise UserError(f"{path} does not hold what it should; delete it and {hint}")
    return content


def has_shape(content, shape):
    """Whether plain data have a shape, see `read_json`."""
    if isinstance(shape, list):
        return isinstance(content, list) and all(has_shape(item, shape[0]) for item in content)
    if not isinstance(shape, dict):
        return isinstance(content, shape)
    found = content if isinstance(content, dict) else {}
    return all(key in found and has_shape(found[key], shape[key]) for key in shape)


def files_below(folder, above=()):
    """All files of a folder, at any depth; links to folders are followed, but not in circles.

    Args:
        folder (str or Path): The folder.
        above (tuple of str): Folders that it is found in, which it does not enter again.

    Yields:
        Path: Each file; what begins with a point is left out.

    Raises:
        UserError: If a folder cannot be read.
    """
    place = os.path.realpath(folder)
    if place in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {reason(error)}") from None
    for name, is_folder in found:
        path = Path(folder) / name
        if is_folder:
            yield from files_below(path, (*above, place))
        else:
            yield path
