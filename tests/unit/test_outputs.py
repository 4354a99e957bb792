"""Outputs: never over something else, whole or absent, with the umask's permissions and the true cause."""

import errno
import os
import stat

import pytest

from megatron_fsvideo.data import outputs
from megatron_fsvideo.data.outputs import OutputError, check_outputs, replacing, try_folder, write_json, write_text


def refused(words, *arguments, **options):
    with pytest.raises(OutputError, match=words) as error:
        check_outputs(*arguments, **options)
    assert "\n" not in str(error.value)


def test_an_input_is_never_replaced_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"precious")
    os.symlink(photo, tmp_path / "link.png")
    os.link(photo, tmp_path / "hard.png")
    for spelling in ("photo.png", "./photo.png", f"../{tmp_path.name}/photo.png", "link.png", "hard.png"):
        refused("is both read .* and written", [spelling], [photo], overwrite=True)
    assert photo.read_bytes() == b"precious"


def test_existing_files_need_overwrite_and_folders_are_never_replaced(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    refused("a.mp4: is there already; .*--overwrite", [tmp_path / "a.mp4"])
    check_outputs([tmp_path / "a.mp4"], overwrite=True)
    refused("is a folder", [tmp_path], overwrite=True)
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    refused("is there already", [tmp_path / "dangling"])
    refused("not a regular file", ["/dev/null"], overwrite=True)


def test_two_outputs_of_one_name(tmp_path):
    refused("would be written twice", [tmp_path / "a.mp4", tmp_path / "b" / ".." / "a.mp4"])


def test_trying_leaves_nothing_behind(tmp_path):
    check_outputs([tmp_path / "new" / "deep" / "a.json", tmp_path / "b.json"])
    try_folder(tmp_path / "other")
    try_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "not permitted"),
        (errno.EROFS, "read-only"),
    ],
)
def test_each_cause_is_told_before_the_work_starts(tmp_path, monkeypatch, number, words):
    def fail(self, *_, **__):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(outputs.Path, "touch", fail)
    refused(f"a.json: cannot be written: .*{words}", [tmp_path / "a.json"])
    with pytest.raises(OutputError, match=f"{tmp_path}: cannot be written: .*{words}"):
        try_folder(tmp_path)


def test_a_file_in_the_way_and_a_name_that_is_too_long(tmp_path):
    (tmp_path / "file").touch()
    refused("a part of its path is a file", [tmp_path / "file" / "a.json"])
    refused("the name is too long", [tmp_path / ("x" * 300)])
    # As long as names can be: the temporary name is not made from it.
    write_text(tmp_path / ("x" * 255), "fits")
    with pytest.raises(OutputError, match="is a file; name a folder"):
        try_folder(tmp_path / "file")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"old": "ü"})
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert target.read_bytes() == '{\n "old": "ü"\n}\n'.encode() and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OutputError, match="no space left"), replacing(target) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == ["a.json"]
    # An error of a file that is read meanwhile keeps its own name.
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(target):
        open("/elsewhere/a", "rb")


def test_permissions_follow_the_umask_and_a_link_stays_a_link(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    os.symlink(tmp_path / "a.txt", tmp_path / "link")
    write_text(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a.txt").read_text() == "y"
