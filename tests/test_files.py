"""Files that are replaced in one step."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepkto_kernels import files


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_and_its_folder(tmp_path):
    path = tmp_path / "a/b/file.txt"
    files.write_text(path, "one\r\ntwo\u2028é\n")
    assert path.read_bytes() == "one\r\ntwo\u2028é\n".encode()
    assert names(path.parent) == ["file.txt"]


def test_it_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    files.write_text(tmp_path / "file", "")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_of_a_link_the_file_behind_it_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a/file")
    for text in ("one", "two"):  # a file that is not there yet, and one that is
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "a/file").read_text() == text
    assert names(tmp_path / "a") == ["file"]


def test_a_pipe_stays_one(tmp_path):
    """As /dev/null has to: whoever may replace it should not."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(pipe.read_text)
        files.write_text(pipe, "text")
        assert reader.result() == "text"
    assert pipe.is_fifo() and names(tmp_path) == ["pipe"]


class Stopped(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def stop_in_the_block(temporary, patch):
    temporary.write_text("half of")
    raise Stopped


def stop_at(name):
    def stop(temporary, patch):
        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        temporary.write_text("half of")
        patch.setattr(os, name, full)

    return stop


@pytest.mark.parametrize(
    "stop, error",
    [
        (stop_in_the_block, Stopped),
        (stop_at("fsync"), OSError),
        (stop_at("replace"), OSError),
        (lambda temporary, patch: None, FileNotFoundError),
    ],
    ids=["in the block", "not on disk", "not named", "nothing written"],
)
@pytest.mark.parametrize("before", ["what was there", None])
def test_what_stops_changes_nothing(tmp_path, monkeypatch, stop, error, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    with monkeypatch.context() as patch, pytest.raises(error):
        with files.replacing(path) as temporary:
            stop(temporary, patch)
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or path.read_text() == before


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        note = lambda *args, n=name, f=original: (done.append(n), f(*args))
        monkeypatch.setattr(os, name, note)
    files.write_text(tmp_path / "file", "text")
    assert done == ["fsync", "replace"]
