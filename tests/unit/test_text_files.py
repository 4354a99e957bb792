"""Text files: UTF-8 under any locale, no byte-order mark, lines end at newlines only, errors name file and line."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fsvideo.data.text_files import TextError, is_unicode, read_json, read_jsonl, read_lines, read_text

ROOT = Path(__file__).parents[2]


def written(folder, content: bytes, name="a.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


def test_separators_inside_a_caption_do_not_cut_a_line(tmp_path):
    captions = ["eins\u2028zwei", "drei\u0085vier", "fünf\x0csechs", "\x1c sieben"]
    text = "".join(json.dumps({"caption": caption}, ensure_ascii=False) + "\r\n" for caption in captions[:2])
    text += "".join(json.dumps({"caption": caption}) + "\n" for caption in captions[2:])
    path = written(tmp_path, b"\xef\xbb\xbf" + text.encode() + b"\n")
    assert [(line.number, value["caption"]) for line, value in read_jsonl(path)] == list(enumerate(captions, start=1))


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_text(written(tmp_path, b"\xef\xbb\xbfhello\n")) == "hello\n"
    assert read_json(written(tmp_path, b"\xef\xbb\xbf{}")) == {}
    with pytest.raises(TextError, match="is UTF-16; save it as UTF-8"):
        read_text(written(tmp_path, "hello".encode("utf-16")))


def test_a_line_in_another_encoding_is_marked_and_the_others_are_read(tmp_path):
    path = written(tmp_path, b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 3}\n')
    lines = list(read_jsonl(path))
    assert [value for _, value in lines] == [{"a": 1}, None, {"a": 3}]
    assert "a.jsonl line 2: is not UTF-8 at byte 10" in lines[1][0].problem
    with pytest.raises(TextError, match="a.jsonl line 2: is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON"),
        (b'{"a": -Infinity}', "is not valid JSON"),
        (b'{"a": 1e400}', "is not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"1" * 5000, "is not valid JSON"),
        (b'{"a": "\\uDE00 \\ud83d\\ude00"}', "half of a surrogate pair"),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path, content, words):
    path = written(tmp_path, b"{}\n" + content + b"\n")
    with pytest.raises(TextError, match=f"a.jsonl line 2.*{words}") as error:
        list(read_jsonl(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(TextError, match="none.txt: cannot be read: No such file"):
        read_lines(tmp_path / "none.txt")
    with pytest.raises(TextError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_half_surrogates_are_recognised():
    assert is_unicode("a 😀 ü") and not is_unicode(json.loads('"a \\ud83d"'))


def test_utf8_whatever_the_locale_says(tmp_path):
    written(tmp_path, "größer 左\n".encode())
    code = "import sys; from megatron_fsvideo.data.text_files import read_text; print(ascii(read_text(sys.argv[1])))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl")]
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        == "'gr\\xf6\\xdfer \\u5de6\\n'\n"
    )


def is_mode(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) <= 3


def opens_text(call: ast.Call) -> bool:
    """Whether a call is `open(path, mode)`, `path.open(mode)`, `path.read_text()` or `path.write_text(text)`."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return is_method  # those of data/ are functions
    if is_method and ast.unparse(call.func.value) == "tarfile":
        return False
    position = 0 if is_method else 1
    mode = call.args[position] if len(call.args) > position else None
    # A method with another first argument than a mode is not Path's.
    return name == "open" and (mode is None or (is_mode(mode) and "b" not in mode.value))


def text_calls_without_encoding(path: Path) -> list[str]:
    """Calls that open a text file in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {word.arg for word in node.keywords}:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}")
    return found


def test_the_search_finds_each_way_to_open_a_text_file():
    calls = ["open(path)", "open(path, 'w')", "path.open()", "path.open('a')", "path.read_text()", "path.write_text(t)"]
    found = [ast.parse(call).body[0].value for call in calls]
    assert all(opens_text(call) for call in found)
    others = ["open(path, 'rb')", "path.open('wb')", "read_text(path)", "index.open(clip)", "open_video(path)"]
    assert not any(opens_text(ast.parse(call).body[0].value) for call in others)


def test_no_text_file_is_opened_in_the_encoding_of_the_locale():
    paths = [p for folder in ("megatron_fsvideo", "tools", "examples") for p in (ROOT / folder).rglob("*.py")]
    paths += list(ROOT.glob("*.py"))
    assert len(paths) > 100
    assert [line for path in paths for line in text_calls_without_encoding(path)] == []
