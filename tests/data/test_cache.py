"""What is kept on disk: found by content alone, made anew when damaged, never an error."""

import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from gptjax.data import cache, fingerprints


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def read_bytes(path):
    return pathlib.Path(path).read_bytes()


class Maker:
    """Makes entries and counts how often."""

    def __init__(self, contents=b"abc" * 1000):
        self.contents, self.made = contents, 0

    def write(self, file):
        self.made += 1
        file.write(self.contents)

    def kept(self, name="k"):
        return cache.get_or_make(name, ".bin", self.write, read_bytes, lambda: None)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_made_once_and_found_by_key(place, caplog):
    maker = Maker()
    assert maker.kept() == maker.kept() == maker.contents
    assert maker.made == 1
    other = Maker(b"other")
    assert other.kept("l") == b"other"
    assert maker.kept() == maker.contents
    assert len(os.listdir(place)) == 2
    assert warnings_of(caplog) == []


def test_keys_tell_their_parts_apart():
    keys = [("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), (1, "a"), ("1", "a"), ()]
    assert len({fingerprints.of_values(*parts) for parts in keys}) == len(keys)
    assert fingerprints.of_values("a", 1) == fingerprints.of_values("a", 1)


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "longer", "of another"])
def test_a_damaged_entry_is_made_anew(place, harm, caplog):
    maker = Maker()
    maker.kept()
    (path,) = place.iterdir()
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    changes = {"cut": data[:-1], "empty": b"", "flipped": flipped, "longer": data + b"\0"}
    stamp = path.stat()
    path.write_bytes(changes.get(harm, b"xyz" * 1000))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert maker.kept() == maker.contents
    assert maker.made == 2
    assert [each.read_bytes() for each in place.iterdir()] == [data]
    assert warnings_of(caplog) == []


def test_nothing_is_kept_where_the_folder_is_set_to_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GPTJAX_CACHE", "")
    monkeypatch.chdir(tmp_path)
    maker = Maker()
    assert cache.folder() == ""
    assert maker.kept() is None
    assert maker.made == 0
    assert os.listdir(tmp_path) == []
    assert warnings_of(caplog) == []


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("GPTJAX_CACHE")
    assert cache.folder() == os.path.expanduser("~/.cache/gptjax")


def full(file):
    file.write(b"some")
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_warning_and_leaves_nothing(place, caplog):
    assert cache.get_or_make("k", ".bin", full, read_bytes, lambda: None) is None
    (line,) = warnings_of(caplog)
    assert str(place) in line
    assert "No space left on device" in line
    assert "\n" not in line
    assert list(place.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file"))
    assert Maker().kept() is None
    assert len(warnings_of(caplog)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_read_and_not_written(place, caplog):
    Maker().kept()
    place.chmod(0o500)
    try:
        assert Maker().kept() == Maker().contents
        assert warnings_of(caplog) == []
        assert Maker().kept("new") is None
        assert len(warnings_of(caplog)) == 1
    finally:
        place.chmod(0o700)


def test_an_error_of_the_maker_is_its_own(place):
    def broken(file):
        file.write(b"some")
        raise ValueError("wrong text")

    with pytest.raises(ValueError, match="wrong text"):
        cache.get_or_make("k", ".bin", broken, read_bytes, lambda: None)
    assert list(place.iterdir()) == []


def test_files_of_killed_writers_go_and_those_of_others_stay(place):
    place.mkdir(parents=True)
    old, new = place / ".k.1.tmp", place / ".k.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    Maker().kept()
    assert not old.exists()
    assert new.exists()


def test_writers_at_the_same_time_both_have_it(place, caplog):
    """Both are in the middle of writing at once, neither sees half a file."""
    meet = threading.Barrier(2)
    found = []

    def write(file):
        file.write(b"first")
        meet.wait(10)
        file.write(b"second")

    def run():
        found.append(cache.get_or_make("k", ".bin", write, read_bytes, lambda: None))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"firstsecond"] * 2
    assert len(list(place.iterdir())) == 1
    assert warnings_of(caplog) == []


def test_processes_at_the_same_time(place):
    code = (
        "import json, sys, time\n"
        "from gptjax.data import cache\n"
        "def write(file):\n"
        "    for i in range(20): file.write(bytes([i]) * 5000); file.flush(); time.sleep(0.01)\n"
        "read = lambda path: open(path, 'rb').read()\n"
        "find = lambda: cache.get_or_make('k', '.bin', write, read, lambda: '')\n"
        "print(json.dumps([len(find()) for _ in range(3)]))\n"
    )
    start = [sys.executable, "-W", "error::UserWarning", "-c", code]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        out, _ = process.communicate(timeout=60)
        assert json.loads(out) == [100_000] * 3
    assert len(list(place.iterdir())) == 1
