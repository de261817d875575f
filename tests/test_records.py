"""Files that are whole, unaltered and ours, or named as damaged."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from immunity_lib import records
from immunity_lib.records import (
    DamagedFile,
    provenance,
    read_record,
    read_tensors,
    set_aside,
    write_atomically,
    write_record,
    write_tensors,
)

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).T,
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "state": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def test_tensors_and_notes_come_back_as_they_were(folder):
    write_tensors(folder / "t.safetensors", TENSORS, {"name": "a", "epochs": [1, 2]})
    tensors, notes = read_tensors(folder / "t.safetensors")
    assert notes == {"name": "a", "epochs": [1, 2]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_checksum_tells_values_types_names_and_notes_apart(folder):
    def checksum(tensors, notes=()):
        return write_tensors(folder / "c.safetensors", tensors, dict(notes))

    ones = torch.ones(4)
    found = [
        checksum({"a": ones}), checksum({"b": ones}), checksum({"a": 2 * ones}),
        checksum({"a": ones.view(2, 2)}), checksum({"a": ones.view(torch.int32)}),
        checksum({"a": ones}, {"note": 1}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert checksum({"a": ones.clone()}) == found[0]


@pytest.fixture(scope="module")
def whole_files(folder):
    """A record and a tensor file, as bytes, each with what reads it."""
    write_record(folder / "r.json", {"accuracy": [0.5, 0.25], "model": "ä", "none": None})
    write_tensors(folder / "w.safetensors", TENSORS, {"name": "model"})
    return {
        read_record: (folder / "r.json").read_bytes(),
        read_tensors: (folder / "w.safetensors").read_bytes(),
    }


@pytest.mark.parametrize("read", [read_record, read_tensors])
@given(data=st.data())
def test_a_flipped_bit_is_detected(folder, whole_files, read, data):
    content = bytearray(whole_files[read])
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = folder / "flipped"
    path.write_bytes(content)
    try:
        found = read(path)
    except DamagedFile as error:
        assert str(path) in str(error)
    else:  # harmless: white space between the fields of a JSON file
        assert read is read_record and found == json.loads(whole_files[read]) | found


@pytest.mark.parametrize("read", [read_record, read_tensors])
@given(data=st.data())
def test_a_truncated_file_is_detected(folder, whole_files, read, data):
    content = whole_files[read].rstrip()
    path = folder / "short"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(DamagedFile, match="short is not a whole"):
        read(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '"text"', "null", '{"checksum": 1}', "\xff"])
def test_foreign_json_is_detected(folder, text):
    (folder / "foreign.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedFile, match=r"foreign\.json"):
        read_record(folder / "foreign.json")


@pytest.mark.parametrize(
    "metadata",
    [None, {"notes": "{}"}, *({"immunity": text} for text in ("{", "3", '{"checksum": "0"}'))],
)
def test_foreign_tensors_are_detected(folder, metadata):
    save_file({"a": torch.ones(2)}, folder / "foreign.safetensors", metadata)
    with pytest.raises(DamagedFile, match=r"foreign\.safetensors is not"):
        read_tensors(folder / "foreign.safetensors")


def test_an_edited_number_is_detected(folder):
    path = folder / "edited.json"
    write_record(path, {"accuracy": 0.5})
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(DamagedFile, match=r"edited\.json was altered"):
        read_record(path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "record.json"
    write_record(path, {"epoch": 1})

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(records.os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_record(path, {"epoch": 2})
    assert read_record(path) == {"epoch": 1}


def test_writing_makes_folders_and_leaves_nothing_beside(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file.txt", "ä")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file.txt"]
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == "ä".encode()


def test_what_cannot_be_written_as_json_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="Tensor"):
        write_record(tmp_path / "record.json", {"accuracy": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_setting_aside_keeps_the_file_and_names_it(tmp_path, capsys):
    names = set()
    for content in ("one", "two"):
        (tmp_path / "weights").write_text(content)
        target = set_aside(tmp_path / "weights", "it is damaged")
        assert target.read_text() == content and not (tmp_path / "weights").exists()
        assert f"set aside as {target}: it is damaged" in capsys.readouterr().err
        names.add(target.name.split("-")[0])
    assert names == {"weights.aside"} and len(list(tmp_path.iterdir())) == 2


def test_provenance_can_be_recorded(tmp_path):
    write_record(tmp_path / "record.json", provenance())
    found = read_record(tmp_path / "record.json")
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert found["library"] == records.library_checksum()


def test_library_checksum_follows_the_source(tmp_path, monkeypatch):
    module = tmp_path / "immunity_lib" / "losses.py"
    write_atomically(module, "beta = 1\n")
    monkeypatch.setattr(records, "ROOT", tmp_path)
    before = records.library_checksum()
    assert records.library_checksum() == before
    module.write_text("beta = 2\n")
    assert records.library_checksum() != before
