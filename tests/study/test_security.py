"""What SECURITY.md promises: files execute nothing, names stay names."""

import ast
import io
import os
import pickle
import re
import tarfile
from datetime import UTC, datetime
from itertools import product
from unittest.mock import Mock

import pytest
import torch
import yaml
from build_site import build_site
from jupyter_server.serverapp import ServerApp
from torchvision.datasets.folder import IMG_EXTENSIONS
from voila.app import Voila

from immunity_lib.data import load_dataset
from immunity_lib.files import read_tensors
from immunity_lib.train import train
from study.catalogue import ModelName
from study.explorer.exploration import own_subject
from study.graph import checks, status
from study.settings import ROOT, load_preset
from study.store import own_folder, read_json

NAME = "parts10-moe-resnet18-standard-seed0"


class Malicious:
    """Whoever unpickles it, runs its command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path):
    """A file that must not be there when the test is over."""
    path = tmp_path / "the command ran"
    yield path
    assert not path.exists()


def test_the_pickle_is_malicious(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture(params=[*range(6), "torch.save", "YAML"], ids=lambda how: f"pickle protocol {how}")
def hostile(canary, request):
    """The bytes of a pickle, or of YAML that makes an object."""
    if request.param == "YAML":
        code = f"!!python/object/apply:os.system [\"touch '{canary}'\"]"
        return f"preset: {code}\nexecutor: {code}\n".encode()
    if request.param == "torch.save":
        torch.save(Malicious(canary), content := io.BytesIO())
        return content.getvalue()
    return pickle.dumps(Malicious(canary), request.param)


READERS = {
    "model.safetensors": read_tensors,
    "record.json": read_json,
    "preset.yaml": lambda path: load_preset(str(path)),
    "config.yaml": lambda path: checks.submits(path.parent),
    "test-0.parquet": lambda path: load_dataset("cifar10", path.parents[1]),
    "table1.json": lambda path: build_site(load_preset("smoke", output_folder=str(path.parents[2]))),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_any_kind_is_refused_by_name_and_runs_nothing(name, hostile, tmp_path):
    folder = tmp_path / ("figures/smoke" if name == "table1.json" else "cifar10")
    folder.mkdir(parents=True)
    for path in (folder / name, folder / name.replace("test", "train")):
        path.write_bytes(hostile)
    with pytest.raises(ValueError, match=name.replace("test", "(test|train)")):
        READERS[name](folder / name)


def test_a_checkpoint(hostile, make_recipe, dataset, tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(hostile)
    train(make_recipe("standalone", epochs=1), dataset, tmp_path)
    assert "checkpoint.safetensors.aside-" in capsys.readouterr().err


def test_what_tells_the_status_is_as_good_as_not_there(hostile, make_settings, tmp_path):
    """A job's record, and a training's log."""
    settings = make_settings(output_folder=str(tmp_path))
    log = own_folder(settings, ModelName.parse(NAME)) / "log.jsonl"
    for path in (settings.runs / "jobs/07_claims.json", log):
        path.parent.mkdir(parents=True)
        path.write_bytes(hostile)
    assert " 0 of " in status.format_status(settings, datetime.now(UTC))


@pytest.mark.parametrize(("data", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_the_unpacked_archive_of_cifar(hostile, tmp_path, data, folder):
    """Its authors pickled it: it is opened only with the published checksums."""
    (tmp_path / folder).mkdir()
    for name in ("test_batch", "batches.meta", *(f"data_batch_{k}" for k in range(1, 6)), "train", "test", "meta"):
        (tmp_path / folder / name).write_bytes(hostile)
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_dataset(data, tmp_path)


def test_the_packed_archive_of_cifar(canary, tmp_path, monkeypatch):
    """It is not even unpacked: torchvision takes it for damaged, and asks for another copy."""
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", Mock(side_effect=OSError))
    content = pickle.dumps(Malicious(canary))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in ("cifar-10-batches-py/data_batch_1", "../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "cifar-10-batches-py").exists() and not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("ending", IMG_EXTENSIONS)
def test_image_files(canary, tmp_path, ending):
    content = pickle.dumps(Malicious(canary))
    for split, kind, number in product(("train", "test"), ("cat", "dog"), range(4)):
        path = tmp_path / split / kind / f"{number}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=ending):
        load_dataset("images", tmp_path, validation_images=2)
    with pytest.raises(ValueError, match=f"picture{ending}"):
        own_subject(content, f"picture{ending}")


def test_nothing_in_the_library_can_execute_what_it_reads():
    """No unpickling, no evaluation of text, no shell."""
    forbidden = {
        "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "np.load", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle",
    }  # fmt: skip
    folders = ("immunity_lib", "study", "benchmarks", "docs", "figures", "pretrained")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not imported & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}:{node.lineno}"
                assert "shell" not in [word.arg for word in node.keywords], f"{path}:{node.lineno}"


def test_the_makefile_s_servers_listen_on_this_machine_alone():
    """By their own defaults, which no option changes."""
    commands = [line for line in (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines() if "ipynb" in line]
    assert len(commands) == 2 and not [one for one in commands if re.search("--[A-Za-z.]*(ip|token|password)", one)]
    assert {server.class_traits()["ip"].default() for server in (Voila, ServerApp)} <= {"localhost", "127.0.0.1"}


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc", "..", ".hidden", f"{NAME}; touch x", "$(x)", "", "a\n"])
def test_names_of_presets_and_models_are_no_paths_and_no_commands(name, tmp_path):
    content = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text()) | {"preset": name}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="give it letters, digits"):
        load_preset(str(tmp_path / "mine.yaml"))
    for model in (name, f"{NAME}{name or ' '}", "parts10", "mnist-moe-resnet18-standard-seed0", f"{NAME[:-1]}-1"):
        with pytest.raises(ValueError, match="no model's name; one is <data>-<method>.*moe-mi"):
            ModelName.parse(model)


@pytest.mark.slow
def test_the_graph_runs_from_and_into_folders_named_like_shell_commands(snakemake, tmp_path):
    ran = tmp_path / "ran"
    hostile = tmp_path / f"'; touch '{ran.name}'; $(touch {ran.name}) `touch {ran.name}` & \"x\""
    hostile.mkdir()
    preset = hostile / "it's {mine}; touch ran.yaml"
    preset.write_bytes((ROOT / "presets/smoke.yaml").read_bytes())
    done = snakemake({"preset": str(preset), "output_folder": str(hostile)}, "start_here")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (hostile / "figures/smoke/figure1.png").exists()
    assert not list(tmp_path.rglob("ran")) and not (ROOT / "ran").exists()
    assert read_json(hostile / "runs/smoke/jobs/00_start_here.json")["state"] == "done"
