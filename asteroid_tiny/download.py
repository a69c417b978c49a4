"""Downloads that can be resumed, and that leave a whole and checked file or none.

While it arrives, a file `a.tar` is `.a.tar.part` beside its place, with a note on where it comes
from. A later call asks the server for the rest only (HTTP Range), and only of the same content
(If-Range with the ETag or date that was noted, RFC 9110 section 13.1.5).
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from .errors import UserError
from .files import reason

BLOCK = 1 << 20
TRIES, PAUSE = 4, 1.0  # of a connection that drops without a new byte; seconds between two
AGENT = "asteroid-tiny"
TIMEOUT = 30  # seconds without a byte


class _Dropped(Exception):
    """The connection ended early, or the server asks to try again."""


def fetch(url, path, sha256=None, md5=None):
    """Downloads a file, or goes on with it, and checks that it is whole.

    Args:
        url (str): Address, http or https.
        path (str or Path): Where to put it; the folder is made. What is there already stays, once
            its checksum is verified.
        sha256, md5 (str, optional): Checksums, in hexadecimal digits.

    Returns:
        Path: `path`.

    Raises:
        UserError: If the address does not answer, the connection drops again and again, size or
            checksum is wrong, or the disk is full. What has arrived is kept for the next call, but
            for content whose checksum is wrong.
    """
    path = Path(path)
    wanted = {name: digest for name, digest in (("sha256", sha256), ("md5", md5)) if digest}
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no address that can be fetched; it must begin with https://")
    try:
        if path.exists():  # also where nothing can be written
            _verify(path, wanted)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.part")) as (part, file):
            if path.exists():  # by the process that had the lock
                _verify(path, wanted)
                return path
            _download(url, file, part, bool(wanted))
            _verify(part, wanted, url)
            os.replace(part, path)
            _note_of(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written: {reason(error)}") from error
    return path


def identify(url):
    """What tells the content of an address from that of another time: its ETag, or else its date.

    Returns:
        str or None: None if the server tells neither.

    Raises:
        UserError: If the address does not answer.
    """
    try:
        # not HEAD, which some servers refuse; the content is not read
        with _open(url, {"Accept-Encoding": "identity", "User-Agent": AGENT}) as answer:
            return answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    except (_Dropped, http.client.HTTPException, OSError) as error:
        raise UserError(f"{url} cannot be reached: {_words(error)}") from None


def digest_of(path, name="sha256"):
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.new(name, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(part):
    """The part, open for appending; another process that fetches the same waits for its end."""
    while True:
        with open(part, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
                continue  # the process that had the lock moved it to its place
            file.seek(0, os.SEEK_END)  # behind what that process left
            try:
                yield part, file
            finally:
                if os.fstat(file.fileno()).st_size == 0:
                    part.unlink(missing_ok=True)
                    _note_of(part).unlink(missing_ok=True)
            return


def _note_of(part):
    return part.with_name(f"{part.name}.json")


def _download(url, file, part, checked):
    """Fills the part, with as many connections as bytes keep coming."""
    left = TRIES
    while True:
        before = file.tell()
        try:
            return _receive(url, file, part, checked)
        except (_Dropped, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            file.flush()
            left = TRIES if file.tell() > before else left - 1
            if not left:
                raise UserError(
                    f"{url} ended early, {_size(file.tell())} have arrived ({_words(error)}); run "
                    "the same command again to go on from there"
                ) from None
            time.sleep(PAUSE)


def _receive(url, file, part, checked):
    """One connection: appends what the server sends, from where the part ends."""
    headers = {"Accept-Encoding": "identity", "User-Agent": AGENT}
    try:
        note = json.loads(_note_of(part).read_text())
    except (OSError, ValueError):
        note = {}
    have = file.tell()
    if have and note.get("url") == url and (note.get("validator") or checked):
        headers["Range"] = f"bytes={have}-"
        if note.get("validator"):
            headers["If-Range"] = note["validator"]
    with _open(url, headers) as answer:
        span, _, total = answer.headers.get("Content-Range", "").partition("/")
        total = int(total) if total.isdigit() else None
        if answer.status == 416 and total == have:  # all had arrived
            return
        if answer.status == 416 or answer.status == 206 and not span.startswith(f"bytes {have}-"):
            _empty(file)
            raise _Dropped("the content has changed")
        if answer.status != 206:
            _empty(file)
            total = answer.length
        if total is None and not answer.chunked and not checked:
            raise UserError(f"{url} does not say its size; it can be fetched with a checksum only")
        etag = answer.headers.get("ETag", "")
        validator = answer.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
        _note_of(part).write_text(json.dumps({"url": url, "validator": validator}))
        _check_space(part, total, file.tell())
        _copy(answer, file, total, url)
    if total is not None and file.tell() != total:
        if file.tell() > total:
            _empty(file)
        raise _Dropped(f"it should be {_size(total)}")


def _empty(file):
    file.seek(0)
    file.truncate()


def _open(url, headers):
    """The server's answer, or its refusal as a sentence."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            error.length = error.chunked = None
            return error
        if error.code in (408, 429, 500, 502, 503, 504):
            raise _Dropped(f"the server says {error.code} {error.reason}") from None
        hint = "check the address" if error.code in (404, 410) else "it cannot be fetched like this"
        raise UserError(f"{url} answers {error.code} {error.reason}: {hint}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, (ConnectionResetError, TimeoutError)):
            raise _Dropped(_words(error.reason)) from None
        raise UserError(f"{url} cannot be reached: {_words(error.reason)}") from None
    except (ValueError, http.client.InvalidURL) as error:  # of addresses that are none
        raise UserError(f"{url} is no address: {_words(error)}") from None
    except OSError as error:  # of the connection, before the answer begins
        raise _Dropped(_words(error)) from None


def _check_space(part, total, have):
    """Says before hours of waiting that the disk is too small."""
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise UserError(
            f"{part.parent} has {_size(free)} free, but {_size(total - have)} are to come; free "
            "some space and run the same command again"
        )


def _copy(answer, file, total, url):
    name = urllib.parse.urlparse(url).path.rpartition("/")[2]
    options = dict(unit="B", unit_scale=True, unit_divisor=1000, desc=name, disable=None)
    with tqdm(total=total, initial=file.tell(), **options) as bar:
        while True:
            try:
                block = answer.read(BLOCK)
            except OSError as error:  # of the connection, not of the file
                raise _Dropped(_words(error)) from None
            if not block:
                break
            file.write(block)
            bar.update(len(block))
    file.flush()
    os.fsync(file.fileno())


def _verify(path, wanted, url=None):
    """Compares checksums; removes what was just fetched from `url` if they differ."""
    for name, digest in wanted.items():
        found = digest_of(path, name)
        if found == digest.lower():
            continue
        if url is None:
            raise UserError(
                f"{path} is there, but its {name} is {found}, not {digest}; delete it to fetch it "
                "again"
            )
        path.unlink()
        _note_of(path).unlink(missing_ok=True)
        raise UserError(
            f"{url} has the {name} {found}, not {digest}; it was not kept, as it is damaged or not "
            "what was expected"
        )


def _words(error):
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _size(n_bytes):
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1000
