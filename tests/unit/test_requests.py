"""Requests of tools/generate.py: their files, the nearest bucket, and what they may not destroy."""

import json

import pytest

from megatron_fsvideo.data.buckets import Bucket
from megatron_fsvideo.data.outputs import OutputError
from megatron_fsvideo.inference.requests import Request, check_request_files, nearest_bucket, read_requests


def lines(folder, *values):
    path = folder / "requests.jsonl"
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file(tmp_path):
    absolute = {"image": "/b.png", "prompt": "", "out": "c", "seed": 3}
    path = lines(tmp_path, {"image": "a.png", "prompt": "ü", "out": "out/a.mp4"}, "", absolute)
    assert read_requests(path, seed=7) == [
        Request(str(tmp_path / "a.png"), "ü", str(tmp_path / "out/a.mp4"), 7),
        Request("/b.png", "", str(tmp_path / "c"), 3),
    ]


GOOD = {"image": "a.png", "prompt": "x", "out": "a.mp4"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "must be an object with fields"),
        ("null", "must be an object with fields"),
        ({"image": "a.png"}, "lacks the field prompt, out"),
        (GOOD | {"sed": 1}, "has no field 'sed'"),
        (GOOD | {"seed": "1"}, "seed must be an integer or none, got '1'"),
        (GOOD | {"seed": True}, "seed must be an integer or none, got True"),
        (GOOD | {"seed": 2**64}, "seed must be an integer"),
        (GOOD | {"prompt": None}, "prompt must be text, got None"),
        (GOOD | {"prompt": "\ud800"}, "half of a surrogate pair"),
        (GOOD | {"out": ""}, "out must be text that is not empty, got ''"),
        (GOOD | {"image": "a\0b"}, "image must be text without a null character"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"requests.jsonl line 2: .*{words}"):
        read_requests(lines(tmp_path, GOOD, line), seed=0)


def test_no_request_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no request"):
        read_requests(lines(tmp_path, " "), seed=0)


def check(*requests, inputs=(), overwrite=False):
    check_request_files(requests, inputs, overwrite=overwrite)


def request(folder, out, image="photo.png"):
    return Request(str(folder / image), "x", str(folder / out), 0)


def test_the_contact_sheet_never_replaces_a_photo(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"photo")
    with pytest.raises(OutputError, match="photo.png: is both read"):
        check(request(tmp_path, "photo.mp4"), overwrite=True)
    # A photo that is no input this time.
    with pytest.raises(OutputError, match="photo.png: is there already"):
        check(request(tmp_path, "photo.mp4", image="other.png"), overwrite=True)


def test_versions_have_sheets_of_their_own(tmp_path):
    one, other = request(tmp_path, "v1.0"), request(tmp_path, "v1.5")
    assert {one.sheet.name, one.record.name, other.sheet.name} == {"v1.0.png", "v1.0.json", "v1.5.png"}
    assert request(tmp_path, "a.MP4").sheet.name == "a.png"
    check(one, other)
    with pytest.raises(OutputError, match="would be written twice"):
        check(request(tmp_path, "a.mp4"), request(tmp_path, "a.mp4"))
    with pytest.raises(OutputError, match="would be written twice"):
        check(request(tmp_path, "a.mp4"), request(tmp_path, "a"))
    with pytest.raises(OutputError, match="is both read"):
        check(request(tmp_path, "requests.mp4"), inputs=[tmp_path / "requests.json"])


def test_own_results_are_replaced_when_asked(tmp_path):
    for name in ("a.mp4", "a.png", "a.json"):
        (tmp_path / name).touch()
    with pytest.raises(OutputError, match="a.mp4: is there already"):
        check(request(tmp_path, "a.mp4"))
    with pytest.raises(OutputError, match="a.png: is there already"):
        check(request(tmp_path, "a.mp4"), overwrite=True)
    (tmp_path / "a.json").write_text(json.dumps({"request": {"out": "elsewhere/a.mp4"}}))
    check(request(tmp_path, "a.mp4"), overwrite=True)


def test_the_bucket_nearest_to_the_photo():
    buckets = [Bucket.parse(text) for text in ("1x704x704", "9x704x1280", "121x704x1280", "121x1280x704")]
    assert str(nearest_bucket(buckets, 1080, 1920)) == "121x704x1280"
    assert str(nearest_bucket(buckets, 4000, 3000)) == "121x1280x704"
    # An image bucket is taken only where there is no other.
    assert nearest_bucket(buckets, 500, 500).num_frames == 121
    assert str(nearest_bucket(buckets[:1], 500, 500)) == "1x704x704"
