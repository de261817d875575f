"""Whatever is fed in, no traceback of ours reaches the user, and what is refused is refused by name.

Each test tries some hundred inputs, always the same ones, in half a minute for all; `FUZZ=30 pytest
tests/study/test_fuzz.py` tries thirty times as many, others every time."""

import io
import json
import os
import shlex
import struct
import tempfile
import warnings
from contextlib import contextmanager
from datetime import UTC, datetime
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pyarrow as pa
import torch
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow.parquet import write_table

from immunity_lib import train
from immunity_lib.data import images, load_dataset
from immunity_lib.files import DamagedFile, read_json, read_tensors, write_atomically, write_tensors
from immunity_lib.recipe import Recipe
from study import catalogue, store
from study.catalogue import ModelName
from study.graph.run import list_results
from study.graph.status import format_status
from study.settings import TRAINING, Settings, load_preset, read_settings

TIMES = int(os.environ.get("FUZZ", "0"))
NAME = ModelName.parse("parts10-moe-resnet18-standard-seed0")
PRESET = read_settings(TINY)


def fuzz(examples, **drawn):
    """Makes a test of a check, which takes an empty folder and what is drawn."""

    def test_of(check):
        @settings(
            max_examples=examples * (TIMES or 1), derandomize=not TIMES, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(**drawn)
        def test(**inputs):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
                check(Path(folder), **inputs)

        return test

    return test_of


@contextmanager
def refused_by_name(*names):
    """What is refused within is so in our own words, of any length that can be read, with one of the names."""
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        assert type(error) in (ValueError, DamagedFile, FileNotFoundError, ConnectionError), repr(error)
        said = str(error).encode().decode()
        assert any(str(name) in said for name in names) and len(said) < 20_000, said[:2000]


ODD = ["", "\n\x1b[31mred", "\ud800", "\0", "٣", "../..", "~nobody/x", "1e-3", "1:30", "8/0", "1e999999999", "x" * 5000]
TEXT = st.sampled_from(ODD) | st.text(max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -(2**70), 10**400, 1e-320, 5e-8, 1e300])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
FILES = st.sampled_from([b"", b"\xff\xfe{", b"[" * 10**5, b'{"a":' * 10**4, b"1" * 5000, b'{"a": 1e999}'])
FILES |= JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20)


def altered(right):
    """Files like that of the right record, of which some values are others and one may lack; or any file."""
    others = st.dictionaries(st.sampled_from(sorted(right)), JSON, max_size=3).map(lambda some: right | some)
    lacking = st.sampled_from([None, *right])
    records = st.builds(lambda some, key: {k: v for k, v in some.items() if k != key}, others, lacking)
    return records.map(lambda record: json.dumps(record).encode()) | FILES


@st.composite
def spoiled(draw, content):
    """A file of which a few bytes are others, and the end may lack."""
    content = bytearray(content)
    places = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 64) - 1)
    for place, byte in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        content[place] = byte
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


KINDS = {field: kind for of in (Recipe, Settings) for field, kind in of.__annotations__.items()}
del KINDS["preset"], KINDS["recipe"]


def with_value(field):
    right = st.fractions(0, 1).map(str) if KINDS[field] is Fraction else st.from_type(KINDS[field])
    return st.tuples(st.just(field), right | NUMBERS | JSON | SCALARS.map(lambda one: [one]) | st.dates())


FIELDS = st.lists(st.sampled_from(sorted(KINDS)).flatmap(with_value), max_size=4).map(dict)
LAUGHS = "[&a0 [x], " + "".join(f"&a{k + 1} [{', '.join([f'*a{k}'] * 9)}], " for k in range(30)) + "]"  # 9**30 of them
VALUES = [
    "2024-13-45", "2024-01-01", "0o17", "017", "1:30:00", "1:1.5", "yes", "off", "~", "!!timestamp x", "!!int ''",
    "!!bool x", "!!float x", "!!binary '*'", "!!python/name:os.system", "!!set {a, b}", "&b [*b]", "&c {c: *c}", "[",
    "9" * 5000, "1.0e+999", "-.inf", ".nan", "'", "{a: b", "*none", '"\\ud800\\0"', "1e-3", "[" * 400, "[yes]", "{}",
    "1:" * 500 + "1.0", "[[1]]", "8/255", "'٣'", "1_000", "'1e999999999'", LAUGHS,
]  # fmt: skip
KEYS = [*KINDS, "recipe", "1", "<<", "? [a]", "&a a"]
LINES = st.builds("{}: {}".format, st.sampled_from(KEYS), st.sampled_from(VALUES))
PRESETS = st.lists(LINES, max_size=4).map(lambda lines: "\n".join([yaml.safe_dump(TINY), *lines]).encode())
PRESETS |= st.sampled_from([b"", LAUGHS.encode(), b"\xef\xbb\xbfepochs: 3", "epochs: 3".encode("utf-16")]) | FILES
PRESETS |= FIELDS.map(lambda fields: yaml.dump(TINY | fields).encode())


def use(accepted):
    """What a preset was accepted for, on paper."""
    trained = catalogue.trained_models(accepted)
    for names in (trained, *(catalogue.measured_models(accepted, kind) for kind in ("attacks", "scores", "adaptive"))):
        assert names and len({*map(str, names)}) == len(names)
        assert all(ModelName.parse(str(name)) == name and shlex.quote(str(name)) == str(name) for name in names)
    with refused_by_name("width"):  # of a network as large as the mixture: `make reproduce` tells it at once
        for recipe in (catalogue.recipe_of(accepted, name) for name in trained):
            assert recipe.is_that_of(recipe.as_json()) and (recipe.adversary or recipe.pairing == "none")
            assert float(recipe.eps) * float(recipe.step_size) > 0 and recipe.epochs / 3 + recipe.batch_size
    flat = json.loads(accepted.model_dump_json())
    recipe = flat.pop("recipe")
    assert read_settings(flat | {field: recipe[field] for field in TRAINING}) == accepted


@fuzz(300, fields=FIELDS | st.dictionaries(st.sampled_from(["recipe", "a"]), JSON), preset=st.just("smoke") | SCALARS)
def test_presets_by_name(folder, fields, preset):
    with refused_by_name("unknown preset", *fields, "data set"):
        use(load_preset(preset, **fields))
    with refused_by_name("preset", *fields, "data set"):
        use(read_settings(TINY | fields | {"preset": preset}))


@fuzz(200, content=PRESETS)
def test_presets_from_files(folder, content):
    (folder / "own.yaml").write_bytes(content)
    with refused_by_name("own.yaml", *KINDS, "unknown parameter", "1 = ", "a name = "):
        use(load_preset(str(folder / "own.yaml")))


@fuzz(300, text=TEXT | st.builds(f"{str(NAME)[:-1]}{{}}".format, TEXT | st.integers()) | st.from_regex(catalogue._NAME))
def test_names_of_models(folder, text):
    with refused_by_name(repr(text)):
        assert str(ModelName.parse(text)) == text


@cache
def pictures():
    """Files of every format, mode and odd size, moving and with a transparent colour."""
    found, modes = {}, "1 L LA P PA RGB RGBA CMYK I;16 I F YCbCr LAB".split()
    for kind, mode, size in product(images.FORMATS, modes, [(32, 32), (1, 1), (1, 5000), (40, 60)]):
        for more in ({}, {"save_all": True, "append_images": [Image.new(mode, size)]}, {"transparency": 0}):
            try:
                Image.new(mode, size).save(file := io.BytesIO(), kind, **more)
                found[file.getvalue()] = None
            except Exception:  # no format has them all
                continue
    return list(found)


SPOILED = st.deferred(lambda: st.sampled_from(pictures()).flatmap(spoiled))


@fuzz(200, content=SPOILED | FILES, exact=st.booleans())
def test_pictures(folder, content, exact):
    with refused_by_name("row 7"):
        found = images.read_images({"train": [("row 7", io.BytesIO(content), 0)]}, exact, "train", 1)
        assert found.images.shape == (1, 3, 32, 32)


PARTS = b"train|test|a|A|b|caf\xe9|caf\\xe9|.x|\n\x1b[1m|a.png|b.jpg|c.PNG".split(b"|")
WHAT = ["picture"] * 6 + ["folder", "empty", "pipe", ".", "..", "a.png", "nowhere", "/dev/zero"]
ENTRIES = st.tuples(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), st.sampled_from(WHAT))
WHOLE = [([split, name, b"a.png"], "picture") for split, name in product((b"train", b"test"), (b"a", b"b"))]


@fuzz(150, tree=st.sampled_from([WHOLE, []]), further=st.lists(ENTRIES, max_size=14))
def test_folders_of_images(folder, tree, further):
    top = os.fsencode(folder / "top")
    os.mkdir(top)
    for parts, what in tree + further:
        path = os.path.join(top, *parts)
        if not os.path.realpath(os.path.dirname(path)).startswith(top):
            continue  # links lead out of here
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if what in ("picture", "empty"):
                with open(path, "xb") as file:
                    file.write(pictures()[0] * (what == "picture"))
            elif what in ("folder", "pipe"):
                {"folder": os.mkdir, "pipe": os.mkfifo}[what](path)
            else:
                os.symlink(what, path)
        except OSError:  # another stands in its way
            continue
    with refused_by_name(folder):
        found = load_dataset("images", folder / "top", validation_images=1)
        assert found.splits["train"].labels.max() < len(found.class_names)


CELLS = st.one_of(*(st.lists(cells, min_size=3, max_size=3) for cells in (
    SPOILED, st.fixed_dictionaries({"bytes": SPOILED | st.none(), "path": st.sampled_from(["lossy/a", None])}),
    st.integers(0, 9) | st.none(), st.integers(-1, 10), st.sampled_from([0.0, 3.0, 9.5]), st.booleans(), st.none(),
    st.sampled_from(["3", "cat"]), st.lists(st.integers(0, 9), max_size=2), st.decimals(0, 9, places=1), st.dates(),
)))  # fmt: skip
COLUMNS = st.sampled_from(["img", "image", "img.bytes", "image.path", "label", "fine_label"])


@st.composite
def tables(draw):
    columns = {"img": [pictures()[0]] * 3, "label": draw(st.just([1, 2, 3]) | CELLS)}
    columns |= draw(st.dictionaries(COLUMNS, CELLS, max_size=2))
    rows, file = draw(st.integers(0, 3)), io.BytesIO()
    write_table(pa.table({name: pa.array(cells[:rows]) for name, cells in columns.items()}), file)
    return draw(st.just(file.getvalue()) | spoiled(file.getvalue()))


@fuzz(200, train=tables(), test=tables())
def test_parquet_files(folder, train, test):
    write_atomically(folder / "cifar10" / "train-0.parquet", train)
    write_atomically(folder / "cifar10" / "test-0.parquet", test)
    with refused_by_name("train-0.parquet", "test-0.parquet", "train-*.parquet", "test-*.parquet", "images of cifar10"):
        found = load_dataset("cifar10", folder, validation_images=0)
        assert not [one for one in found.splits.values() if one.labels.dtype != torch.long or (one.labels > 9).any()]


@cache
def trained():
    """A model's data, record and weights, as if it had been trained."""
    data, recipe = load_dataset("parts10", None, 2, 1, 1), catalogue.recipe_of(PRESET, NAME)
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(path := Path(folder) / store.WEIGHTS, train.build_model(recipe, data).state_dict(), {})
        known = {"weights": store.checksum(path), "data": {"checksum": data.splits["train"].checksum}}
        return data, known | {"recipe": recipe.as_json()}, path.read_bytes()


@fuzz(100, record=st.deferred(lambda: altered(trained()[1])), own=st.booleans())
def test_records_of_trainings(folder, record, own):
    data, _, weights = trained()
    here = PRESET.model_copy(update={"output_folder": str(folder)})
    with patch.object(store, "PRETRAINED", folder):
        place = (store.own_folder if own else store.pretrained_folder)(here, NAME)
        write_atomically(place / "record.json", record)
        write_atomically(place / store.WEIGHTS, weights)
        store._load_if_usable(here, NAME, data)
        with refused_by_name("record.json"):
            assert isinstance(store.read_record(here, NAME, "training"), dict)


FRAME = pd.DataFrame({"split": "test", "image": [0, 1], "gates": [b"a", b"b"], "uniform": [True, False]}).to_parquet()


@fuzz(150, record=altered({"kind": "attacks", "summary": {}}), frame=spoiled(FRAME) | FILES)
def test_records_of_measurements(folder, record, frame):
    here = PRESET.model_copy(update={"output_folder": str(folder), "pretrained": False})
    path = store.record_path(here, NAME, "attacks")
    write_atomically(path, record)
    write_atomically(path.with_suffix(".parquet"), frame)
    for read, names in ((store.read_record, NAME), (store.read_frame, [NAME])):
        with refused_by_name(path.stem):
            read(here, names, "attacks")


NETWORK, SOURCE = torch.nn.Linear(2, 1), {"recipe": Recipe(epochs=2).as_json(), "data": "0"}
TENSORS = {"model.weight": torch.zeros(1, 2), "model.bias": torch.zeros(1), "random.cpu": torch.get_rng_state()}
WRONG = st.sampled_from([torch.zeros(2), torch.zeros(1, dtype=torch.complex64), torch.zeros(5056, dtype=torch.uint8)])
OTHERS = st.dictionaries(st.sampled_from([*TENSORS, "momentum.0", "momentum.1"]), WRONG, max_size=1)
HEADERS = altered({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"immunity": "{}"}})


@fuzz(200, notes=altered(SOURCE | {"log": [{"epoch": 1}]}), header=HEADERS, others=OTHERS)
def test_checkpoints(folder, notes, header, others):
    path = folder / train.CHECKPOINT
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with refused_by_name(path.name):
        read_tensors(path)
    with patch("immunity_lib.files.json.dumps", lambda *_, **__: notes.decode(errors="replace")):
        write_tensors(path, TENSORS | others, {})
    optimiser = torch.optim.SGD(NETWORK.parameters(), 0.1, 0.9)
    log = train._restore(folder, Recipe(epochs=2), SOURCE["data"], NETWORK, optimiser)
    assert all(isinstance(entry, dict) for entry in log)


STATE = {"error": "", "machine": "node7", "notebook": "x", "epochs": 1, "seconds": 1.0, "trained": 1, "process": 1}
STATE |= {"seen": "2024-01-01T00:00:00+00:00"}
STATES = st.sampled_from(["running", "failed", "x"]).flatmap(lambda state: altered(STATE | {"state": state}))


@fuzz(60, job=STATES, log=st.lists(altered({"seconds": 1.0}), max_size=3), sidecar=altered({"caption": "About."}))
def test_what_is_told_of_jobs_and_results(folder, job, log, sidecar):
    here = PRESET.model_copy(update={"output_folder": str(folder)})
    files = {here.runs / "jobs" / f"{name}.json": job for name in (f"02_training-{NAME}", "07_claims")}
    files |= {store.own_folder(here, NAME) / "log.jsonl": b"\n".join(log), here.figures / "table1.json": sidecar}
    for path, content in files.items():
        write_atomically(path, content)
    assert "jobs done" in format_status(here, datetime.now(UTC)).encode().decode()
    assert "table1" in list_results(here)
    with refused_by_name("table1.json"):
        read_json(here.figures / "table1.json")
