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
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path, content, words):
    path = written(tmp_path, b"{}\n" + content + b"\n")
    with pytest.raises(TextError, match=f"a.jsonl line 2: .*{words}") as error:
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


def text_calls_without_encoding(path: Path) -> list[str]:
    """Calls that open a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        is_binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        is_text = name in ("read_text", "write_text") or (name in ("open", "fdopen") and not is_binary)
        takes_path = name in ("read_text", "write_text") and not owner  # the functions of data/
        if is_text and "encoding" not in given and not takes_path and owner not in ("av", "tarfile", "Image", "os"):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}")
    return found


def test_no_text_file_is_opened_in_the_encoding_of_the_locale():
    paths = [p for folder in ("megatron_fsvideo", "tools", "examples") for p in (ROOT / folder).rglob("*.py")]
    paths += list(ROOT.glob("*.py"))
    assert len(paths) > 100
    assert [line for path in paths for line in text_calls_without_encoding(path)] == []
