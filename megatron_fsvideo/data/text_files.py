"""Reading text files of users: UTF-8 whatever the locale says, a byte-order mark dropped, lines split at newlines only.

`str.splitlines` also splits at U+2028, U+0085 and form feeds, which are ordinary characters inside a caption.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fsvideo.config import rules

UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
# JSON spells letters beyond 16 bits as two escapes; one of them alone is no letter.
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF_PAIR = re.compile(f"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")


class TextError(ValueError):
    """A text file, or a line of one, that cannot be read. The message is one line that names the file."""


class HalfPairError(TextError):
    """A JSON text with half of a surrogate pair."""


@dataclass(frozen=True)
class Line:
    """A line of a text file.

    Attributes:
        number: counted from 1.
        text: without the newline; None where the bytes are not UTF-8.
        problem: what is wrong where `text` is None, with file and line.
    """

    number: int
    text: str | None
    problem: str = ""

    def checked(self) -> str:
        """The text.

        Raises:
            TextError: the bytes are not UTF-8.
        """
        if self.text is None:
            raise TextError(self.problem)
        return self.text


def read_text(path: str | Path) -> str:
    """The whole text of a file; newlines as they are.

    Raises:
        TextError: the file is missing, a folder, not permitted or not UTF-8; the message names the first bad line.
    """
    return "\n".join(line.checked() for line in read_lines(path))


def read_lines(path: str | Path) -> list[Line]:
    """The lines of a file, the empty ones too. A line that is not UTF-8 is marked, so that the others can be used.

    Raises:
        TextError: the file is missing, a folder, not permitted, or UTF-16.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    if data.startswith(UTF16_BOMS):
        raise TextError(f"{path}: is UTF-16; save it as UTF-8")
    return [_decode(path, number, raw) for number, raw in enumerate(data.removeprefix(UTF8_BOM).split(b"\n"), start=1)]


def read_jsonl(path: str | Path) -> Iterator[tuple[Line, Any]]:
    """(line, parsed value) of every line that is not blank; the value is None where the line is not UTF-8.

    Raises:
        TextError: the file cannot be read, or a line is not JSON.
    """
    for line in read_lines(path):
        if line.text is None:
            yield line, None
        elif line.text.strip():
            yield line, parse_json(line.text, f"{path} line {line.number}")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        TextError: the file cannot be read, or is not JSON.
    """
    return parse_json(read_text(path), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        TextError: the file cannot be read, or is not a JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise TextError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
        where: file and line, for messages.

    Raises:
        TextError: not JSON (NaN and Infinity are not), nested too deeply; HalfPairError where a letter is cut in half.
    """
    try:
        return rules.parse_json(text, where)
    except ValueError as error:
        if _HALF_PAIR.search(text):
            raise HalfPairError(f"{where}: holds half of a surrogate pair, which is no letter") from None
        raise TextError(printable(str(error))) from None


def one_line(text: str) -> str:
    """A text with every run of white space as one space."""
    return " ".join(text.split())


def is_unicode(text: str) -> bool:
    """Whether a text can be stored as UTF-8: JSON escapes and file names can hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def printable(text: str) -> str:
    """A text with half surrogate pairs spelled out, so that a message with it can be printed and stored."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _decode(path: str | Path, number: int, raw: bytes) -> Line:
    try:
        return Line(number, raw.removesuffix(b"\r").decode("utf-8"))
    except UnicodeDecodeError as error:
        shown = raw[max(0, error.start - 8) : error.start + 8]
        return Line(
            number, None, f"{path} line {number}: is not UTF-8 at byte {error.start} ({shown!r}); save it as UTF-8"
        )
