"""Lists of videos: JSONL, CSV, Parquet and folders; what is wrong is one line, or one entry that is skipped."""

import json
import os

import pytest

from megatron_fsvideo.data.manifest import VideoEntry, folder_entries, read_manifest_lines, require_captions


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [("a.mp4", 'größer\nlinks, "schnell"', None, None), ("sub/b.mp4", "左", 4, 9)]


def expected(folder):
    return [
        VideoEntry(str(folder / "a.mp4"), "a.mp4", ROWS[0][1]),
        VideoEntry(str(folder / "sub/b.mp4"), "sub/b.mp4", "左", 4, 9),
    ]


def test_one_list_in_every_format(tmp_path):
    lines = [dict(zip(("path", "caption", "start", "num_frames"), row, strict=True)) for row in ROWS]
    jsonl = written(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read_manifest_lines(jsonl) == expected(tmp_path)
    text = (
        '\ufefffile_name,text,start,num_frames,fps\r\na.mp4,"größer\nlinks, ""schnell""",,,8\r\nsub/b.mp4,左,4,9,8\r\n'
    )
    assert read_manifest_lines(written(tmp_path, "a.csv", text)) == expected(tmp_path)
    text = text.replace(",", "\t").replace('\t "', ', "')
    assert read_manifest_lines(written(tmp_path, "a.tsv", text.replace("links\t", "links,"))) == expected(tmp_path)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ("video", "prompt", "start", "num_frames")
    table = arrow.table({name: list(column) for name, column in zip(names, zip(*ROWS, strict=True), strict=True)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_manifest_lines(tmp_path / "a.parquet") == expected(tmp_path)


def test_no_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="a.parquet: is not a Parquet file"):
        read_manifest_lines(written(tmp_path, "a.parquet", b"PAR1 hello PAR1"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"caption": "x"}', "has no path; the column may be called path, video_path"),
        ('["a.mp4"]', "not a JSON object with a path"),
        ('{"path": 3}', "path is 3: expected `str`"),
        ('{"path": "a", "caption": ["x"]}', "caption is list of 1: expected `str"),
        ('{"path": "a", "start": "1", "num_frames": 9}', "start is '1': expected `int"),
        ('{"path": "a", "start": 1.5, "num_frames": 9}', "start is 1.5: expected `int"),
        ('{"path": "a", "start": -1, "num_frames": 9}', "start is -1: expected `int` >= 0"),
        ('{"path": "a", "num_frames": 0}', "num_frames is 0: expected `int` >= 1"),
        ('{"path": "a", "num_frames": true}', "num_frames is True: expected `int"),
        ('{"path": "a", "num_frames": 1e400}', "not valid JSON"),
        ('{"path": "a", "start": 2}', "has start but no num_frames"),
        ('{"path": "a", "start": NaN}', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, words):
    path = written(tmp_path, "a.jsonl", '{"path": "good.mp4"}\n' + line + "\n")
    with pytest.raises(ValueError, match="a.jsonl line 2") as error:
        read_manifest_lines(path)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,start,num_frames\na.mp4,x,9\n", "row 2: start is 'x': expected `int"),
        ("path,caption\na.mp4\n", "row 2: has another number of columns"),
        ("path,caption\na.mp4,b,c\n", "row 2: has another number of columns"),
        ('path,caption\na.mp4,"b\n', "is not CSV"),
    ],
)
def test_a_bad_csv(tmp_path, content, words):
    with pytest.raises(ValueError, match="a.csv") as error:
        read_manifest_lines(written(tmp_path, "a.csv", content))
    assert words in str(error.value)


def test_what_is_wrong_with_one_entry_alone_marks_it(tmp_path):
    lines = [b'{"path": "a.mp4", "caption": "a"}', b'{"path": "b.mp4", "caption": "caf\xe9"}']
    lines += [b'{"path": "c.mp4", "caption": "half \\ud83d"}', b'{"path": "d\\u0000.mp4", "caption": "d"}']
    entries = read_manifest_lines(written(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert [entry.problem == "" for entry in entries] == [True, False, False, False]
    assert "a.jsonl line 2: is not UTF-8" in entries[1].problem
    assert "a.jsonl line 3: holds half of a surrogate pair" in entries[2].problem
    assert "line 4: path" in entries[3].problem
    require_captions(entries)
    whole = read_manifest_lines(written(tmp_path, "b.jsonl", b'{"path": "c.mp4", "caption": "\\ud83d\\ude00"}'))
    assert whole[0].caption == "\N{GRINNING FACE}"
    csv = read_manifest_lines(written(tmp_path, "a.csv", b"path,caption\na.mp4,x\nb.mp4,caf\xe9\nc.mp4,y\n"))
    assert [entry.problem == "" for entry in csv] == [True, False, True]
    assert "a.csv line 3: is not UTF-8" in csv[1].problem


def test_a_folder_with_names_and_captions_in_other_encodings(tmp_path):
    for name in (b"a.mp4", b"b.mp4", b"caf\xe9.mp4"):
        open(os.path.join(os.fsencode(tmp_path), name), "wb").close()
    written(tmp_path, "a.txt", "\ufeffthe  camera\npans")
    written(tmp_path, "b.txt", b"caf\xe9")
    entries = folder_entries(tmp_path)
    assert entries[0].caption == "the camera pans" and not entries[0].problem
    assert "b.txt line 1: is not UTF-8" in entries[1].problem
    assert "the file name is not UTF-8" in entries[2].problem and entries[2].source == "caf\\udce9.mp4"
    for entry in entries:
        json.dumps([entry.source, entry.problem], ensure_ascii=False).encode()
