import os
import threading

import pytest

from core.files import atomic_directory, atomic_file, remove_partial_files, write_atomically


def test_a_replaced_file_is_old_or_new_never_partial(tmp_path, monkeypatch):
    target = tmp_path / "live"
    write_atomically(target, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "profile.json"
    texts = [str(i) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(target, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(OSError, match="No such file"), atomic_directory(target) as staging:
        (staging / "no directory" / "weights").write_text("half")
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as staging:
        (staging / "weights").write_text("whole")
        assert not target.exists()
    assert (target / "weights").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_left_is_removed_and_nothing_of_other_files(tmp_path):
    mine, other = tmp_path / "a.bin", tmp_path / "a-1.bin"
    with atomic_file(other) as partial:
        partial.write_text("being written")
        (tmp_path / ".a.bin.partial").write_text("left by an older version")
        (tmp_path / ".a.bin.00ff.partial").write_text("left by a killed process")
        remove_partial_files(mine)
        assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert other.read_text() == "being written"
