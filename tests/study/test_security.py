"""What SECURITY.md promises: files execute nothing, names stay names."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import pytest
import torch
import yaml
from build_site import build_site
from torchvision.datasets.folder import IMG_EXTENSIONS

from immunity_lib.data import load_dataset
from immunity_lib.files import DamagedFile, read_tensors
from immunity_lib.train import train
from study import catalogue
from study.catalogue import ModelName
from study.explorer.exploration import own_subject
from study.graph import run, status
from study.settings import ROOT, load_preset
from study.store import own_folder, read_json, trained_model, write_json

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


@pytest.fixture(params=range(6), ids="pickle protocol {}".format)
def pickled(canary, request):
    return pickle.dumps(Malicious(canary), request.param)


def test_the_pickle_is_malicious(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_weights(pickled, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickled)
    with pytest.raises(DamagedFile, match="model.safetensors"):
        read_tensors(path)


def test_weights_as_torch_saves_them(canary, tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save(Malicious(canary), path)
    with pytest.raises(DamagedFile, match="model.safetensors"):
        read_tensors(path)


def test_a_checkpoint(canary, make_recipe, dataset, tmp_path, capsys):
    (tmp_path / "checkpoint.safetensors").write_bytes(pickle.dumps(Malicious(canary)))
    train(make_recipe("standalone", epochs=1), dataset, tmp_path)
    assert "checkpoint.safetensors.aside-" in capsys.readouterr().err


def test_weights_in_the_place_of_a_trained_model(canary, make_settings, dataset, tmp_path):
    settings = make_settings(output_folder=str(tmp_path), epochs=1)
    name = ModelName.parse(NAME)
    trained_model(settings, name, dataset)
    weights = own_folder(settings, name) / "model.safetensors"
    weights.write_bytes(pickle.dumps(Malicious(canary)))
    trained_model(settings, name, dataset)
    read_tensors(weights)  # made anew


def test_a_record(pickled, tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(pickled)
    with pytest.raises(DamagedFile, match="record.json"):
        read_json(path)


@pytest.fixture(params=[*range(6), "YAML"])
def no_yaml_of_ours(canary, request):
    """A pickle, or YAML that makes an object."""
    if request.param != "YAML":
        return pickle.dumps(Malicious(canary), request.param)
    code = f"!!python/object/apply:os.system [\"touch '{canary}'\"]"
    return f"preset: {code}\nexecutor: {code}\n".encode()


def test_a_preset_and_a_profile(no_yaml_of_ours, tmp_path):
    for name in ("preset.yaml", "config.yaml"):
        (tmp_path / name).write_bytes(no_yaml_of_ours)
    with pytest.raises(ValueError, match="preset.yaml"):
        load_preset(str(tmp_path / "preset.yaml"))
    with pytest.raises(ValueError, match="config.yaml"):
        run.submits(tmp_path)


def test_parquet_files(pickled, tmp_path):
    (tmp_path / "cifar10").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cifar10" / f"{split}-0.parquet").write_bytes(pickled)
    with pytest.raises(ValueError, match="parquet cannot be used"):
        load_dataset("cifar10", tmp_path)


def test_the_unpacked_archive_of_cifar(pickled, tmp_path):
    """Its authors pickled it: it is opened only with the published checksums."""
    for folder, names in {
        "cifar-10-batches-py": [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"],
        "cifar-100-python": ["train", "test", "meta"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(pickled)
    for data in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match="incomplete or damaged"):
            load_dataset(data, tmp_path)


def test_the_packed_archive_of_cifar(canary, tmp_path, monkeypatch):
    """It is not even unpacked: torchvision takes it for damaged, and asks for another copy."""

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", unreachable)
    content = pickle.dumps(Malicious(canary))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in ("cifar-10-batches-py/data_batch_1", "../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "cifar-10-batches-py").exists()
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("ending", IMG_EXTENSIONS)
def test_image_files(canary, tmp_path, ending):
    content = pickle.dumps(Malicious(canary))
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = tmp_path / split / kind
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=ending):
        load_dataset("images", tmp_path, validation_images=2)
    with pytest.raises(ValueError, match=f"picture{ending}"):
        own_subject(content, f"picture{ending}")


def test_the_log_of_a_training(canary, make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    folder = own_folder(settings, ModelName.parse(NAME))
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_bytes(pickle.dumps(Malicious(canary)))
    assert status.epoch_seconds(settings, ModelName.parse(NAME)) == []


def test_an_executed_notebook(canary, make_settings, tmp_path):
    settings = make_settings(output_folder=str(tmp_path))
    folder = settings.runs / "notebooks"
    folder.mkdir(parents=True)
    (folder / "00_start_here.ipynb").write_bytes(pickle.dumps(Malicious(canary)))
    with pytest.raises(ValueError, match="00_start_here.ipynb"):
        build_site(settings)


def test_nothing_in_the_library_can_execute_what_it_reads():
    """No unpickling, no evaluation of text, no shell."""
    forbidden = {
        "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "np.load", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle",
    }  # fmt: skip
    folders = ("immunity_lib", "study", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not imported & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}:{node.lineno}"
                shell = [word for word in node.keywords if word.arg == "shell"]
                assert not shell, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "preset", ["../outside", "a/b", "/etc", "..", ".hidden", "$(touch x)", "a b", "a;b", "", "a\n"]
)
def test_a_presets_name_is_one_folder_below_the_results(preset, tmp_path):
    content = yaml.safe_load((ROOT / "presets/smoke.yaml").read_text()) | {"preset": preset}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="give it letters, digits"):
        load_preset(str(path))


@pytest.mark.parametrize("name", ["../../outside", f"../{NAME}", f"{NAME}; touch x", f"{NAME}\n", "$(touch x)", "."])
def test_a_models_name_is_made_of_its_parts(name):
    with pytest.raises(ValueError, match="is no model's name"):
        ModelName.parse(name)


def test_every_model_lies_in_the_folder_of_its_preset():
    for preset in ("smoke", "demo", "cifar10-small", "paper"):
        settings = load_preset(preset)
        for name in catalogue.trained_models(settings):
            folder = own_folder(settings, name)
            assert folder.resolve().parent == (settings.runs / "models").resolve()


@pytest.mark.slow
def test_the_graph_runs_from_and_into_folders_named_like_shell_commands(tmp_path):
    ran = tmp_path / "ran"
    hostile = tmp_path / f"'; touch '{ran.name}'; $(touch {ran.name}) `touch {ran.name}` & \"x\""
    hostile.mkdir()
    preset = hostile / "it's {mine}; touch ran.yaml"
    preset.write_bytes((ROOT / "presets/smoke.yaml").read_bytes())
    config = {"preset": str(preset), "data_folder": "", "output_folder": str(hostile)}
    described = hostile / "graph.json"
    write_json(described, config)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "start_here", "--snakefile", str(ROOT / "Snakefile"),
         "--cores", "1", "--directory", str(hostile), "--configfile", str(described)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (hostile / "figures/smoke/figure1.png").exists()
    assert not list(tmp_path.rglob("ran")) and not (ROOT / "ran").exists()
    job = json.loads((hostile / "runs/smoke/jobs/00_start_here.json").read_text())
    assert job["state"] == "done"
