"""Files and folders are there whole or not at all, and foreign faults are one line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipeline.errors import UserError, reason
from pipeline.files import atomic_folder, atomically, foreign_faults

pytestmark = pytest.mark.usefixtures("project")


def test_a_file_is_whole_or_the_old_one() -> None:
    path = Path("deep/a.txt")
    with atomically(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), atomically(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_whole_or_not_there() -> None:
    path = Path("deep/folder")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as folder:
        (folder / "a").touch()
        raise KeyboardInterrupt
    assert list(Path("deep").iterdir()) == []
    path.mkdir()
    with atomic_folder(path) as folder:
        (folder / "a").touch()
        assert not list(path.iterdir())
    assert list(path.iterdir()) == [path / "a"] and list(Path("deep").iterdir()) == [path]


def test_the_folder_of_a_faster_process_stays() -> None:
    path = Path("folder")
    with pytest.raises(FileExistsError), atomic_folder(path) as folder:
        (folder / "mine").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert [file.name for file in path.iterdir()] == ["theirs"] and list(Path().iterdir()) == [path]
    Path("file").touch()
    with pytest.raises(NotADirectoryError), atomic_folder(Path("file")):
        pass


def test_foreign_faults_are_one_line_and_ours_pass() -> None:
    def fault(reason: str) -> UserError:
        return UserError("a.tar", reason)

    with pytest.raises(UserError, match=r"^a\.tar: KeyError: 'two lines'$"), foreign_faults(fault):
        raise KeyError("two lines")
    with pytest.raises(UserError, match=r"^a\.tar: ConnectionError: no route$"), foreign_faults(fault):
        raise ConnectionError("no\nroute")
    with pytest.raises(UserError, match=r"^a\.tar: TimeoutError: no reason given$"), foreign_faults(fault):
        raise TimeoutError
    with pytest.raises(UserError, match=r"^a\.tar: gone$"), foreign_faults(fault, lambda _: fault("gone")):
        raise FileNotFoundError("a.tar")
    with pytest.raises(UserError, match=r"^ours$"), foreign_faults(fault):
        raise UserError("", "ours")
    with pytest.raises(OSError, match="No space left"), foreign_faults(fault):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_reason_of_a_foreign_fault_is_never_empty() -> None:
    assert reason(ValueError("first\r\nsecond")) == "first"
    assert reason(OSError()) == reason(OSError("\n")) == "OSError"
