"""Files and folders appear whole or not at all: after errors, on full disks, when killed."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from asteroid_tiny.files import (
    alone,
    files_below,
    read_json,
    sweep,
    temporary_folder,
    whole_file,
    whole_folder,
)

OLD, NEW = "the old content\n", "the new content\n"


@pytest.fixture(params=[whole_file, whole_folder], ids=["file", "folder"])
def whole(request, tmp_path):
    """What is alike for files and folders: (context manager, target, write, read)."""
    if request.param is whole_file:
        return whole_file, tmp_path / "notes.txt", write_file, read_file
    return whole_folder, tmp_path / "notes", write_folder, read_folder


def write_file(path, text):
    path.write_text(text)


def read_file(path):
    return path.read_text()


def write_folder(path, text):
    for depth in ("", "one", "one/two/three"):
        (path / depth).mkdir(parents=True, exist_ok=True)
        (path / depth / "a.txt").write_text(text)


def read_folder(path):
    texts = [file.read_text() for file in sorted(path.rglob("*")) if file.is_file()]
    assert len(texts) == 3 and len(set(texts)) == 1, "not all of one writing"
    return texts[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end_of_the_block(whole):
    context, target, write, read = whole
    with context(target) as part:
        write(part, OLD)
        assert not target.exists()
    assert read(target) == OLD
    with context(target) as part:
        write(part, NEW)
        assert read(target) == OLD, "readers have the old one meanwhile"
    assert read(target) == NEW
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written_before", [True, False])
def test_an_interruption_leaves_the_old_one_and_nothing_else(whole, error, written_before):
    context, target, write, read = whole
    if written_before:
        write(target, OLD)
    with pytest.raises(error):
        with context(target) as part:
            write(part, NEW)
            raise error
    assert names(target.parent) == [target.name] * written_before
    assert not written_before or read(target) == OLD


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("when", ["fsync", "writing", "replace"])
def test_a_full_disk_is_said_and_leaves_the_old_one(whole, refused, monkeypatch, when):
    context, target, write, read = whole
    write(target, OLD)
    if when == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    elif when == "replace":
        monkeypatch.setattr(os, "replace", full_disk)
        monkeypatch.setattr(type(target), "rename", full_disk)
    with refused(target, "the disk is full"):
        with context(target) as part:
            write(part, NEW)
            if when == "writing":
                full_disk()
    monkeypatch.undo()
    assert read(target) == OLD
    assert names(target.parent) == [target.name]


def test_all_files_are_on_the_disk_before_the_rename(whole, monkeypatch):
    context, target, write, read = whole
    flushed = set()

    def fsync(number):
        assert not target.exists()
        flushed.add(os.readlink(f"/proc/self/fd/{number}"))

    monkeypatch.setattr(os, "fsync", fsync)
    with context(target) as part:
        write(part, NEW)
        files = {str(path) for path in [part, *part.rglob("*")] if path.is_file()}
    assert flushed == files


def test_other_errors_of_the_system_are_said(whole, refused):
    context, target, write, _ = whole
    target.parent.joinpath("file").write_text("in the way")
    blocked = target.parent / "file" / target.name
    with refused(blocked, "could not be written"):
        with context(blocked) as part:
            write(part, NEW)


def test_the_old_folder_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, refused):
    with whole_folder(tmp_path / "notes") as part:
        write_folder(part, OLD)
    rename = Path.rename

    def fails(path, target):
        if path.suffix == ".part":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with refused("notes could not be written"), whole_folder(tmp_path / "notes") as part:
        write_folder(part, NEW)
    assert read_folder(tmp_path / "notes") == OLD and names(tmp_path) == ["notes"]


def test_what_a_killed_process_left_is_swept_an_hour_later(tmp_path):
    for name in ("talk_est1.wav", 40 * "x" + ".flac", "none"):
        with whole_file(tmp_path / name) as part:
            part.write_text(NEW)
            for other in ("1", "2"):
                shutil.copy(part, part.with_name(part.name.replace(str(os.getpid()), other)))
    (tmp_path / ".own.part.wav").touch()
    for k in range(9):  # which cannot be deleted, in any order
        (tmp_path / f".{k}.deadbeef.9.part").mkdir()
        os.utime(tmp_path / f".{k}.deadbeef.9.part", (0, 0))
    old = [path for path in tmp_path.iterdir() if ".2.part" in path.name]
    for path in [*old, tmp_path / ".own.part.wav", tmp_path / "none"]:
        os.utime(path, (0, 0))
    before = set(tmp_path.iterdir())
    sweep(tmp_path)
    assert len(old) == 3 and set(tmp_path.iterdir()) == before - set(old)
    sweep(tmp_path / "missing")


def test_the_old_folder_of_a_killed_process_comes_back_until_a_new_one_is_whole(tmp_path):
    (tmp_path / ".notes.1.old").mkdir()
    write_folder(tmp_path / ".notes.1.old", OLD)
    with pytest.raises(KeyError), whole_folder(tmp_path / "notes"):
        assert read_folder(tmp_path / "notes") == OLD
        raise KeyError
    assert read_folder(tmp_path / "notes") == OLD and names(tmp_path) == ["notes"]


def test_what_a_killed_process_left_beside_a_folder_goes_with_the_next_writing(tmp_path):
    ours, others = (".notes.1.part", ".notes.2.old"), (".notes.3.part", ".notes.b.4.old")
    for name in (*ours, *others, "notes"):
        write_folder(tmp_path / name, OLD)
    for name in (*ours, ".notes.b.4.old"):
        os.utime(tmp_path / name, (0, 0))
    with whole_folder(tmp_path / "notes") as part:
        write_folder(part, NEW)
    assert read_folder(tmp_path / "notes") == NEW
    assert names(tmp_path) == sorted([*others, "notes"]), "one may be at work, one is of notes.b"


def test_the_old_folder_of_another_one_is_not_taken(tmp_path):
    write_folder(tmp_path / ".notes.b.4.old", OLD)
    with pytest.raises(KeyError), whole_folder(tmp_path / "notes"):
        raise KeyError
    assert names(tmp_path) == [".notes.b.4.old"]


def test_processes_that_end_at_once_replace_a_folder_in_turn(tmp_path, monkeypatch):
    target, fork = tmp_path / "notes", multiprocessing.get_context("fork")
    write_folder(target, OLD)
    other = fork.Process(target=write_whole, args=(whole_folder, target, write_folder))
    rename = Path.rename

    def slowly(path, new):
        rename(path, new)
        if path == target and other.pid is None:
            monkeypatch.undo()
            other.start()
            other.join(0.5)

    monkeypatch.setattr(Path, "rename", slowly)
    with whole_folder(target) as part:
        write_folder(part, OLD)
    other.join()
    assert other.exitcode == 0 and read_folder(target) == NEW and names(tmp_path) == ["notes"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk" / "notes").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "notes")
    with whole_folder(tmp_path / "link") as part:
        write_folder(part, NEW)
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]
    assert read_folder(tmp_path / "disk" / "notes") == NEW and names(tmp_path / "disk") == ["notes"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path, refused):
    (tmp_path / "taken").mkdir()
    with refused(tmp_path / "taken", "could not be written: Is a directory"):
        with whole_file(tmp_path / "taken") as part:
            part.write_text(NEW)
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize("name", ["a.csv", "a.tar.gz", "none"])
def test_the_part_has_the_suffix_and_folder_of_the_file(tmp_path, name):
    target = tmp_path / "made" / "for it" / name
    with whole_file(str(target)) as part:
        assert part.name.endswith(target.suffix) and part.parent == target.parent
        assert part.name.startswith("."), "tables of contents and globs leave it out"
        part.write_text(NEW)
    assert target.read_text() == NEW


def write_and_wait(context, target, write, begun):
    with context(target) as part:
        write(part, NEW)
        begun.set()
        multiprocessing.Event().wait()


@pytest.mark.parametrize("written_before", [True, False])
def test_a_killed_process_leaves_the_old_one(whole, written_before):
    context, target, write, read = whole
    if written_before:
        write(target, OLD)
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    process = fork.Process(target=write_and_wait, args=(context, target, write, begun))
    process.start()
    assert begun.wait(20)
    process.kill()
    process.join()
    assert process.exitcode == -9
    assert target.exists() == written_before
    assert not written_before or read(target) == OLD
    left = [name for name in names(target.parent) if name != target.name]
    assert all(name.startswith(".") and ".part" in name for name in left)
    with context(target) as part:
        write(part, NEW)
    assert read(target) == NEW


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    """In containers process numbers come again: a start after a kill may have the same one."""
    target = tmp_path / "notes"
    write_folder(target, OLD)
    for end in ("part", "old"):
        left = tmp_path / f".notes.{os.getpid()}.{end}"
        left.mkdir()
        (left / "stale.txt").write_text("stale")
    with whole_folder(target) as part:
        write_folder(part, NEW)
    assert read_folder(target) == NEW
    assert names(tmp_path) == ["notes"]


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path, refused):
    code = "import sys; from asteroid_tiny.files import alone\n"
    code += "with alone(sys.argv[1], 'trains'): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"in\n"
        with refused("another process trains in", tmp_path), alone(tmp_path, "trains"):
            pass
        first.kill()
    with alone(tmp_path, "trains"):
        pass


def write_whole(context, target, write):
    with context(target) as part:
        write(part, NEW)


def test_processes_that_write_the_same_do_not_meet(whole):
    context, target, write, read = whole
    with context(target) as part:
        write(part, OLD)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=write_whole, args=(context, target, write))
        process.start()
        process.join()
        assert process.exitcode == 0 and read(target) == NEW
    assert read(target) == OLD, "who ends last has the last word"
    assert names(target.parent) == [target.name]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def lacking(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lacking)
    entered = []
    with alone(tmp_path, "trains"):
        entered.append(True)
    assert entered


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, refused, monkeypatch):
    (tmp_path / "a" / "closed").mkdir(parents=True)
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with refused(tmp_path / "a" / "closed", "cannot be read: Permission denied"):
        list(files_below(tmp_path))


def test_a_temporary_folder_that_cannot_be_made_is_told(tmp_path, refused, monkeypatch):
    with temporary_folder("a-") as folder:
        assert Path(folder).name.startswith("a-")
    assert not Path(folder).exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with refused("no temporary folder can be made", "set TMPDIR"), temporary_folder():
        pass


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is missing; measure again"),
        (b"", "is no JSON"),
        (b"\xff", "is no JSON"),
        (100_000 * b"[", "is no JSON"),
        (b"3", "does not hold what it should; delete it and measure again"),
        (b"[]", "does not hold"),
        (b"{}", "does not hold"),
        (b'{"rows": {}}', "does not hold"),
        (b'{"rows": [{"at": 1}, {"at": "x"}]}', "does not hold"),
        (b'{"rows": [{"at": 1}], "more": 0}', None),
    ],
    ids=lambda part: str(part)[:30],
)
def test_json_that_is_not_what_it_should_be_is_named(content, words, tmp_path, refused):
    path, shape = tmp_path / "a.json", {"rows": [{"at": (int, float)}]}
    if content is not None:
        path.write_bytes(content)
    if words is None:
        assert read_json(path, shape, "measure again")["more"] == 0
        return
    with refused(path, words):
        read_json(path, shape, "measure again")
