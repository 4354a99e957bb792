"""Which files of a folder count."""

import os

import pytest

from megatron_fsvideo.data.listing import files_in, list_images, list_videos


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root, found):
    return [str(path.relative_to(root)) for path in found]


def test_hidden_files_and_editors_copies_do_not_count_and_it_is_said(tmp_path, caplog):
    touch(tmp_path, "b.mp4", "._b.mp4", ".DS_Store", "b.mp4~", "#b.mp4#", ".hidden/c.mp4", "b.txt", "notes.doc")
    touch(tmp_path, ".shots/0.jsonl")  # our own index
    assert names(tmp_path, list_videos(tmp_path)) == ["b.mp4"]
    (line,) = caplog.messages
    assert "1 video files; left out: 5 hidden or an editor's copies (" in line and "1 of other types (1 .doc)" in line


def test_the_extensions_that_cameras_and_the_web_use(tmp_path):
    touch(tmp_path, "a.ts", "b.GIF", "c.mts", "d.m2ts", "e.wmv", "f.3gp", "g/h.MKV", "x.jpg")
    found = ["a.ts", "b.GIF", "c.mts", "d.m2ts", "e.wmv", "f.3gp", "g/h.MKV"]
    assert names(tmp_path, list_videos(tmp_path)) == found
    assert names(tmp_path, list_images(tmp_path)) == ["x.jpg"]


def test_links_are_followed_once(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    touch(elsewhere, "far.mp4", "film.mp4")
    root = tmp_path / "root"
    touch(root, "sub/a.mp4")
    os.symlink(elsewhere, root / "linked")
    os.symlink(elsewhere, root / "linked_again")
    os.symlink(root, root / "sub" / "circle")
    os.symlink(root / "sub", root / "same")
    os.symlink(elsewhere / "film.mp4", root / "film.mp4")
    os.symlink(tmp_path / "nowhere.mp4", root / "broken.mp4")
    found = ["film.mp4", "linked/far.mp4", "linked/film.mp4", "sub/a.mp4"]
    assert names(root, list_videos(root)) == found
    assert "1 links that lead nowhere (broken.mp4); " in caplog.text
    assert "2 links within the folder (same, circle)" in caplog.text


def test_nothing_there(tmp_path):
    touch(tmp_path, "._a.mp4", "b.doc")
    with pytest.raises(ValueError, match="no video file below .*left out: 1 hidden.*1 of other types"):
        list_videos(tmp_path)
    with pytest.raises(ValueError, match="is not a folder of videos"):
        list_videos(tmp_path / "none")


def test_files_of_one_folder(tmp_path):
    touch(tmp_path, "b.json", "._b.json", "a.json", "sub/c.json", "d.json~")
    assert names(tmp_path, files_in(tmp_path, ".json")) == ["a.json", "b.json"]
