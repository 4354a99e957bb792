"""Command lines and job.json files with random faults: one line that names the fault, never a traceback."""

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fsvideo.checkpoint.agreement import check_agreement
from megatron_fsvideo.checkpoint.dit_release import DiTNetwork, DiTRecord, dit_of_run, open_dit_release
from megatron_fsvideo.checkpoint.release import load_fsae, save_fsae, save_release
from megatron_fsvideo.checkpoint.run_record import RunDescription, RunRecord, parse_record
from megatron_fsvideo.checkpoint.save_folder import JOB_FILE, iteration_folder, read_record
from megatron_fsvideo.config import DIT_PRESETS, FSAE_PRESETS, DiTJob, FSAEJob, build_job, from_dict, parse_job, to_dict
from megatron_fsvideo.config.flags import make_parser
from megatron_fsvideo.data.latent_dataset import LatentDataset
from megatron_fsvideo.data.sample_order import list_record, order_record
from megatron_fsvideo.models.fsae import FSAE
from tests.latent_fixtures import write_latent_dataset

JOBS: list[tuple[type, dict[str, Any]]] = [(DiTJob, DIT_PRESETS), (FSAEJob, FSAE_PRESETS)]
ODD_WORDS = """
-1 0 1 2 3 7 -0 1e-9 1e9 1e400 nan inf -inf NaN 0x10 1_0 1.5 99999999999999999999 9e99 true none None yes adam vgg16
full a2a+p2p 9x64x64 1x1 x . / -- - --lr --help= = = é ½ 中文 💥 ' " \\ \\n %s %(x)s {} {0} ../.. ~ $HOME * [1,2]
{"a":1} \udc80
""".split()
ODD_WORDS += ["", " ", "a b", "\n", "\x00", "9" * 400, "x" * 5000]
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, "", "x", "1", "adam", "9x64x64", "\0", "é",
    "x" * 5000, [], [1], [None], [[]], ["a", 1], {}, {"a": 1}, {"lr": {}}, [0] * 1000,
]  # fmt: skip
QUICK, MANY = 150, 500


def is_one_line(text: str) -> bool:
    return text.count("\n") <= 1 and len(text) < 5000


@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("job_class", "presets"), JOBS)
def test_mutated_command_lines(job_class, presets, count, capsys):
    draw = random.Random(20)
    actions = [action for action in make_parser(job_class, presets)._actions if action.dest not in ("help", "preset")]
    refused = 0
    for _ in range(count):
        argv = mutated_flags(draw, actions, sorted(presets))
        try:
            job = parse_job(job_class, presets, argv)
        except SystemExit as left:
            error = capsys.readouterr().err
            assert left.code == 2 and is_one_line(error) and "error: " in error, (argv, error)
            refused += 1
        else:
            # What is taken can be stored and read again.
            assert from_dict(job_class, json.loads(json.dumps(to_dict(job)))) == job, argv
    assert count // 2 < refused < count


def mutated_flags(draw: random.Random, actions: list[Any], presets: list[str]) -> list[str]:
    argv = ["--preset", draw.choice(presets)] if draw.random() < 0.8 else []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        action = draw.choice(actions)
        flag = draw.choice(action.option_strings)
        if draw.random() < 0.05:
            flag = flag[: draw.randrange(1, len(flag))]
        words = [draw.choice(ODD_WORDS) for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 3)))]
        argv += [f"{flag}={words[0]}"] if words and draw.random() < 0.2 else [flag, *words]
    return argv


@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("job_class", "presets"), JOBS)
def test_mutated_jobs(job_class, presets, count):
    draw = random.Random(21)
    refused = 0
    for _ in range(count):
        values = mutated_tree(
            draw, json.loads(json.dumps(to_dict(build_job(job_class, presets[draw.choice([*presets])]))))
        )
        try:
            from_dict(job_class, values, "job.json")
        except ValueError as error:
            assert str(error).startswith("job.json: ") and is_one_line(str(error)), error
            refused += 1
    assert count // 2 < refused


def mutated_tree(draw: random.Random, tree: Any) -> Any:
    """A JSON value with one to three faults: a value replaced, wrapped, left out, renamed or added anywhere."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(containers(tree))
        place = draw.choice(places)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            continue
        key, kind = draw.choice(keys), draw.randrange(10)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[str(key) + draw.choice(("", "_", "é"))] = place.pop(key)
        elif kind == 2:
            place[key] = draw.choice(([place[key]], {"a": place[key]}))
        elif kind == 3 and isinstance(place, dict):
            place[draw.choice(("a", "", "lr", "__class__", "x" * 300))] = deepcopy(draw.choice(ODD_VALUES))
        else:
            place[key] = deepcopy(draw.choice(ODD_VALUES))
    return tree


def containers(tree: Any) -> list[Any]:
    if not isinstance(tree, dict | list) or not tree:
        return []
    children = tree.values() if isinstance(tree, dict) else tree
    return [tree] + [place for child in children for place in containers(child)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    job = build_job(DiTJob, DIT_PRESETS["dit_debug"])
    data = LatentDataset([str(write_latent_dataset(tmp_path_factory.mktemp("data"), 2))]).description()
    network = DiTNetwork(job.model, job.diffusion, bf16=False, average=True).to_json()
    network |= {"optimizer": {"optimizer": "adam"}, "codec": data["autoencoder"]}
    order = order_record("a shuffle", {"seed": 1}, [list_record("videos", ["a", "b"])])
    return RunRecord(10, 20, {"dit": network}, RunDescription(to_dict(job), data, order, {}, {"phase": 1}))


@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", ["values", "bytes"])
def test_mutated_job_files(damage, count, record, tmp_path):
    draw = random.Random(22)
    target = iteration_folder(tmp_path, 10)
    target.mkdir()
    networks = json.loads(json.dumps(record.to_json()))["networks"]
    refused = 0
    for _ in range(count):
        content = json.loads(json.dumps(record.to_json()))
        text = json.dumps(mutated_tree(draw, content) if damage == "values" else content, indent=1).encode()
        (target / JOB_FILE).write_bytes(mutated_bytes(draw, text) if damage == "bytes" else text)
        try:
            found = parse_record(read_record(tmp_path, 10), str(target))
            dit_of_run(found, str(target))
            check_agreement(found, networks, record.run, str(target), "resume")
        except ValueError as error:
            assert str(target) in str(error) and is_one_line(str(error)), error
            refused += 1
    assert count // 3 < refused


@pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_releases(count, record, tmp_path):
    draw = random.Random(23)
    fsae = FSAE(build_job(FSAEJob, FSAE_PRESETS["fsae_debug"]).model)
    save_fsae(tmp_path / "fsae", fsae)
    dit = DiTRecord(DiTNetwork.parse(record.networks["dit"], ""), record.run.data, 10, {})
    save_release(tmp_path / "dit", json.loads(json.dumps(dit.to_json())), {"w": torch.zeros(1)}, {})
    reads: dict[str, Callable[[Path], Any]] = {"fsae": load_fsae, "dit": open_dit_release}
    refused = 0
    for name, read in reads.items():
        config = tmp_path / name / "config.json"
        original = config.read_bytes()
        for _ in range(count // 2):
            tree = mutated_tree(draw, json.loads(original))
            config.write_bytes(draw.choice((json.dumps(tree).encode(), mutated_bytes(draw, original))))
            try:
                read(tmp_path / name)
            except ValueError as error:
                assert str(tmp_path / name) in str(error) and is_one_line(str(error)), error
                refused += 1
    assert count // 2 < refused


def mutated_bytes(draw: random.Random, text: bytes) -> bytes:
    place = draw.randrange(len(text))
    changes: list[Callable[[], bytes]] = [
        lambda: text[:place] + bytes([text[place] ^ (1 << draw.randrange(8))]) + text[place + 1 :],
        lambda: text[:place],
        lambda: text[:place] + draw.randbytes(4) + text[place:],
        lambda: text[:place] + text[place + draw.randrange(1, 40) :],
        lambda: b"[" * 50_000 + text,
        lambda: text[:place] + b'{"a":' * 20_000 + text[place:],
        lambda: text.replace(b"1", draw.choice((b"NaN", b"1e999", b"-", b"1" * 5000)), 1),
        lambda: b"",
        lambda: b"\xef\xbb\xbf" + text,
    ]
    return draw.choice(changes)()
