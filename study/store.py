"""What lies on disk: trained models, records with their provenance, frames, tables and figures.

runs/<preset>/models/<model>/       model.safetensors, record.json, checkpoint and log
runs/<preset>/records/              <model>.<kind>.parquet, the frame, and .json, its record
figures/<preset>/                   what is shown, each with a .json that says what it rests on
pretrained/<preset>/<model>/        what comes with the project: a training record, weights, frames, their records"""

import hashlib
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch.utils.flop_counter import FlopCounterMode

from immunity_lib.data import Dataset, load_dataset
from immunity_lib.files import (
    DamagedFile,
    read_json,
    read_tensors,
    set_aside,
    write_atomically,
    write_json,
    write_tensors,
)
from immunity_lib.moe import ConstantGate, ImmunityMoE
from immunity_lib.recipe import Recipe
from immunity_lib.train import CHECKPOINT, build_model, is_compiled, is_mixed, train
from study.catalogue import DATA, ModelName, members, method_title, own_recipe, recipe_of, single
from study.settings import NOT_OF_THE_RESULT, ROOT, Settings, flat, load_preset, preset_names, validate

PRETRAINED = ROOT / "pretrained"
RESTORED = "it comes with the project: git checkout pretrained restores it"  # what of it is damaged
CODE = "immunity_lib", "study"
PACKAGES = ("torch", "torchvision", "torchattacks", "numpy", "safetensors", "snakemake")
WEIGHTS = "model.safetensors"
LOCKED = 24 * 3600  # seconds behind which a lock's holder is taken for dead
ASKED = {  # the settings that each kind of frame depends on, beside the images
    "attacks": ("attacks", "attack_gates", "steps", "attacked_images", "magnitudes"),
    "adaptive": ("steps", "gate_samples", "auto_attack_steps", "auto_attack_images"),
    "scores": (),
}
COLUMNS = set("split image label attack family sees gates experts switched uniform trained".split())  # of every frame
DEVICES = Path("/dev")
_say_once = cache(print)  # each line, in a process

# Else a GPU rounds float32 to ten bits before it multiplies (TF32), which no setting of a preset asks for
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def code_files() -> list[Path]:
    """The files of both packages, but for what Python and editors keep beside them: caches, locks and copies."""
    found = (path for package in CODE for path in (ROOT / package).rglob("[!.#]*.*[!~]"))
    return sorted(path for path in found if not {"__pycache__", ".ipynb_checkpoints"} & {*path.relative_to(ROOT).parts})


def provenance() -> dict[str, Any]:
    """What a result depends on besides its settings: code, packages and hardware."""
    digest = hashlib.sha256()
    for path in (one for one in code_files() if one.suffix == ".py"):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    about = Path("/proc/cpuinfo")
    named = re.search("model name\\s*: (.*)", about.read_text() if about.exists() else "")
    # Its instructions decide how it rounds
    instructions = torch.backends.cpu.get_cpu_capability()
    processor = f"{named[1] if named else platform.machine()}, {instructions}, {os.cpu_count()} cores"
    changes = _git("status", "--porcelain", "--", *CODE)
    return {
        # An image has no history, but was told its commit when it was built
        "commit": _git("rev-parse", "HEAD") or os.environ.get("IMMUNITY_COMMIT") or None,
        "uncommitted_changes": None if changes is None else bool(changes),
        "library": digest.hexdigest()[:16],  # by which a record tells which code made it
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    # Without git, or a checkout, the source's checksum still says which code it was. Its own checkout: neither one that
    # the shell names, nor one that the project was unpacked in
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", *arguments]
    how = {"env": {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}, "cwd": ROOT}
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, **how).strip()
    return None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_gpus(visible: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES leaves any GPU: -1, nothing or a cluster's NoDevFiles do not."""
    return visible is None or bool(re.match("[0-9]|GPU-|MIG-", visible))


def chosen_device() -> torch.device:
    """A GPU where there is one, else the CPU. OSError where PyTorch cannot use one that is there, and is not another
    job's: on the CPU, what is meant for it would take days, and say nothing."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = [str(gpu) for gpu in DEVICES.glob("nvidia[0-9]*") if os.access(gpu, os.W_OK)]
    if there and names_gpus(chosen):
        told = f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, can use no GPU, though there is"
        told = f"{told} {', '.join(there)} and CUDA_VISIBLE_DEVICES is {chosen or 'not set'}"
        raise OSError(f"{told}; mend the driver or that variable, of which -1 chooses the CPU")
    return torch.device("cpu")


def load_data(settings: Settings, name: str = "") -> Dataset:
    """The preset's data set, or one of its further ones, with as many images as it says."""
    recipe = settings.recipe
    counts = (recipe.train_images, recipe.validation_images, settings.test_images)
    dataset = load_dataset(name or recipe.dataset, settings.data_folder or ROOT / "data", *counts)
    available = len(dataset.splits["test"])
    for field in ("attacked_images", "adaptive_images"):
        if (count := getattr(settings, field) or 0) > available:
            raise ValueError(f"{field} is {count}, but {dataset.name} has only {available} test images; lower it")
    return dataset


def own_folder(settings: Settings, name: ModelName) -> Path:
    """Where a model lies that was trained here."""
    return settings.runs / "models" / str(name)


def pretrained_folder(settings: Settings, name: ModelName) -> Path:
    """Where a model lies that comes with the project."""
    return PRETRAINED / settings.preset / str(name)


def _remedy(settings: Settings) -> str:
    """The command that makes what is missing."""
    preset = settings.preset if settings.preset in preset_names() else f"<the file of {settings.preset}>"
    given = {"DATA": settings.data_folder, "OUTPUT": settings.output_folder}
    command = " ".join([f"PRESET={preset}", *(f"{key}={shlex.quote(one)}" for key, one in given.items() if one)])
    return f"run: make reproduce {command} (settings that differ from that preset's need a preset of their own)"


def trained_model(settings: Settings, name: ModelName, dataset: Dataset) -> ImmunityMoE:
    """A model of the preset, in eval mode; trained first if it is not there yet.
    Weights that are damaged, or were trained with other settings or data, are set aside and made anew. An ensemble is
    put together from its members, with equal weights."""
    if name.method == "ensemble":
        experts = [trained_model(settings, one, dataset).experts[0] for one in members(settings, name)]
        return ImmunityMoE(experts, ConstantGate(len(experts)).to(chosen_device()), evaluation_gate="uniform").eval()
    if (model := _load_if_usable(settings, name, dataset)) is None:
        lock = own_folder(settings, name) / ".lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=LOCKED):  # a second process waits, and finds it trained
                model = _load_if_usable(settings, name, dataset) or _train_and_save(settings, name, dataset)
        except Timeout as error:
            told = f"{lock} is held for {LOCKED / 3600:.0f} hours, seen from {platform.node()}; remove that file"
            raise TimeoutError(f"{told} if no job works on this model any more, on any machine") from error
    return model.to(chosen_device()).eval()


def shipped_model(name: str) -> ImmunityMoE:
    """A model that comes with the project, by its name or <preset>/<name>, in eval mode; its data need not be there.
    Raises ValueError with the valid names for any other, and for one that two presets have."""
    there = {"/".join(path.parts[-3:-1]): path.parent for path in sorted(PRETRAINED.glob(f"*/*/{WEIGHTS}"))}
    found = [one for one in there if name in (one, one.partition("/")[2])]
    if len(found) != 1:
        told = f"{name!r} names {len(found) or 'no'} models that come with the project"
        raise ValueError(f"{told}; choose one of {', '.join(there)}")
    known, (tensors, _) = read_json(there[found[0]] / "record.json"), read_tensors(there[found[0]] / WEIGHTS)
    # Of its data a model needs the number of classes, and mean and deviation, which are among the weights
    classes, trained_on = len(tensors["experts.0.classifier.weight"]), SimpleNamespace(**known["data"])
    data = Dataset(found[0], ("",) * classes, (0.0,) * 3, (1.0,) * 3, (), "", {"train": trained_on})
    return _load(there[found[0]], validate(Recipe, known["recipe"]), data).eval()


def _load_if_usable(settings: Settings, name: ModelName, dataset: Dataset) -> ImmunityMoE | None:
    """The model that was trained here, set aside if it cannot be used, else the project's; None if there is neither."""
    recipe, own = recipe_of(settings, name), own_folder(settings, name)
    files = [own / WEIGHTS, own / "record.json"]
    if all(path.exists() for path in files):
        try:
            return _load(own, recipe, dataset)
        except DamagedFile as error:
            for path in files:
                set_aside(path, f"{error}; the model is trained anew")
    folder = find_record(settings, name, "training").parent
    if folder != own and (folder / WEIGHTS).exists():  # else its record came alone
        try:
            model = _load(folder, recipe, dataset)
            _say_once(f"{name}: weights that come with the project")
            return model
        except (DamagedFile, OSError) as error:
            _say_once(f"{folder} comes with the project and is not used: {error}")
    return None


def _load(folder: Path, wanted: Recipe, dataset: Dataset) -> ImmunityMoE:
    """The model in the folder; DamagedFile says why it cannot be used."""
    known, model = read_json(folder / "record.json"), build_model(wanted, dataset)
    try:
        if known["weights"] != checksum(folder / WEIGHTS):
            raise DamagedFile(f"{folder / WEIGHTS} is another file than its record speaks of")
        same_data = known["data"]["checksum"] == dataset.splits["train"].checksum
        if not (wanted.is_that_of(known["recipe"]) and same_data):
            raise DamagedFile("it was trained with other settings or other data")
        model.load_state_dict(read_tensors(folder / WEIGHTS)[0])
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / 'record.json'} is no whole record of a training: {error!r}") from error
    except RuntimeError as error:
        raise DamagedFile(f"its weights are of another version of the code ({error})") from error
    return model


def _train_and_save(settings: Settings, name: ModelName, dataset: Dataset) -> ImmunityMoE:
    wanted, published = recipe_of(settings, name), own_recipe(settings, name)
    folder, device, images = own_folder(settings, name), chosen_device(), dataset.splits["train"]
    print(f"training {name} on {device}, data from {dataset.source}", flush=True)
    model, log = train(wanted, dataset, folder, name=str(name), device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for expert in model.experts:
            expert(images.images[:1].to(device) / 255)
    write_tensors(folder / WEIGHTS, model.state_dict(), {"name": str(name)})
    content = {
        "kind": "training",
        "model": str(name),
        "recipe": wanted.as_json(),
        "data": {"source": dataset.source, "images": len(images), "checksum": images.checksum},
        "published": published and {key: published[key] for key in ("source", "gaps")},
        "weights": checksum(folder / WEIGHTS),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_accumulates": counter.get_total_flops() // 2,
        "log": log,
        "mixed_precision": is_mixed(wanted, device),
        "compiled": is_compiled(wanted, device),
        "seconds": round(sum(entry["seconds"] for entry in log), 1),
        "provenance": provenance(),
    }
    write_json(folder / "record.json", content)
    (folder / CHECKPOINT).unlink(missing_ok=True)  # the model has superseded it
    return model


def record_path(settings: Settings, name: ModelName, kind: str) -> Path:
    """Where a record lies that was made here: that of a "training" beside the weights, those of "attacks", "scores" and
    "adaptive" each beside its frame."""
    if kind == "training":
        return own_folder(settings, name) / "record.json"
    return settings.runs / "records" / f"{name}.{kind}.json"


def find_record(settings: Settings, name: ModelName, kind: str) -> Path:
    """Where a record is: what was made here, else what came with the project, each if it is whole and of these
    settings; if there is neither, where it will be."""
    own = record_path(settings, name, kind)
    shipped = pretrained_folder(settings, name) / ("record.json" if kind == "training" else f"{kind}.json")
    for path in (own, shipped)[: 1 + settings.pretrained]:
        try:
            if read_if_answered(path, settings, name, kind):
                return path
        except (DamagedFile, OSError) as error:
            remedy = "" if path == own else f"; {RESTORED}"
            _say_once(f"{path} is not used: {error}{remedy}")  # one's own is set aside by who needs it
    return own


def will_have_weights(settings: Settings, names: Sequence[ModelName]) -> bool:
    """Whether the weights behind these models are there or will be: they do not come with all that was measured."""
    records = [find_record(settings, name, "training") for name in single(settings, [*names])]
    return all(path.is_relative_to(settings.runs) or path.with_name(WEIGHTS).exists() for path in records)


def read_record(settings: Settings, name: ModelName, kind: str) -> dict[str, Any]:
    """The record that `find_record` finds. Raises FileNotFoundError, with the command that makes it, where there is
    none of these settings yet, and DamagedFile, which sets a measurement aside, to be made anew by the graph."""
    path = find_record(settings, name, kind)
    try:
        if known := read_if_answered(path, settings, name, kind):
            return known
    except DamagedFile as error:
        if kind == "training":  # set aside by `trained_model`, with the weights
            raise
        raise set_record_aside(path, str(error)) from error
    told = "is not trained" if kind == "training" else f"has no record of its {kind}"
    raise FileNotFoundError(f"{name} {told} with these settings yet ({path}); {_remedy(settings)}")


def read_if_answered(path: Path, settings: Settings, name: ModelName, kind: str) -> dict[str, Any] | None:
    """A record, if it is there, and about these settings and the training that is there."""
    if not path.exists():
        return None
    known = read_json(path)
    if (about := (known.get("kind"), known.get("model"))) != (kind, str(name)):  # which name its copy's file, too
        raise DamagedFile(f"{path} is not about the {kind} of {name}, but {about}")
    if kind == "training":
        if not isinstance(known.get("rounding", {}), dict):
            raise DamagedFile(f"{path} is no whole record of a training")
        return known if recipe_of(settings, name).is_that_of(known.get("recipe")) else None
    try:
        asked, weights, _ = known["asked"].items(), known["weights"], known["summary"].items()
    except (KeyError, AttributeError) as error:
        raise DamagedFile(f"{path} cannot be read ({error!r})") from error
    with suppress(FileNotFoundError, DamagedFile):  # of the training
        if question_of(settings, kind).items() <= asked and weights == weights_of(settings, name, path):
            return known
    return None


def question_of(settings: Settings, kind: str) -> dict[str, Any]:
    """What a preset asks of a kind of frame, for a JSON file."""
    asked = settings.model_dump(mode="json", include={*ASKED[kind], "test_images"})
    if kind == "adaptive":
        asked["adaptive_count"] = settings.adaptive_count
    eps, step_size = str(settings.recipe.eps), str(settings.recipe.step_size)
    return asked if kind == "scores" else asked | {"eps": eps, "step_size": step_size}


def weights_of(settings: Settings, name: ModelName, record: Path) -> list[str]:
    """Checksums of the weights behind a model that a record is about: where they were rounded to come with the project,
    one that came with it is about what its training left, one that was made here about what there is."""
    known = [read_record(settings, one, "training") for one in single(settings, [name])]
    exact = record.is_relative_to(PRETRAINED)
    return [(exact and one.get("rounding", {}).get("from")) or one.get("weights") for one in known]


def read_frame(settings: Settings, names: Sequence[ModelName], kind: str) -> pd.DataFrame:
    """The long frame (see `measure`): those of a kind of these models, one under the other, and what each model is by
    "name", "method", "expert" and "seed", and by "model", "data" and "training" as readers call them.
    Raises as `read_record`, also for a frame that is damaged."""
    frames = []
    for name in names:
        known = read_record(settings, name, kind)  # says what is missing
        path = find_record(settings, name, kind).with_suffix(".parquet")
        content = path.read_bytes() if path.exists() else b""  # a disk that fails now may not later
        try:
            frame = pd.read_parquet(BytesIO(content))
            if lacking := COLUMNS - set(frame):
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            if known.get("frame") not in (None, hashlib.sha256(content).hexdigest()):
                raise ValueError("its record speaks of another")
        except Exception as error:  # for a damaged file, pandas and pyarrow raise errors of all kinds
            raise set_record_aside(path.with_suffix(".json"), f"{path} cannot be read ({error})") from error
        called = {"model": method_title(name.method, name.expert), "data": DATA[name.dataset], "training": name.regime}
        images = known.get("data", {})
        called["images_of"] = [images.get(split, "") for split in frame["split"]]
        called |= name.model_dump(include={"method", "expert", "seed"})
        frames.append(frame.assign(name=str(name), **called))
    found = pd.concat(frames, ignore_index=True)
    for data, own in found.drop_duplicates(["data", "split", "images_of"]).groupby("data"):
        if own["split"].duplicated().any():
            told = f"{' and '.join(own['name'].unique())} were measured on different test images of {data}"
            raise ValueError(f"{told}; measure one again: {_remedy(settings)}")
    return found


def set_record_aside(path: Path, reason: str) -> DamagedFile:
    """Rename a record and its frame, of which one cannot be used; returns what to raise where both are needed now."""
    if path.is_relative_to(PRETRAINED):  # which stays as it is
        told = f"{reason}; {RESTORED}"
        _say_once(f"{path} is not used: {told}")
        return DamagedFile(told)
    for file in (path, path.with_suffix(".parquet")):
        if file.exists():
            set_aside(file, f"{reason}; it is made anew")
    return DamagedFile(f"{reason}; the same command makes it anew")


def write_artefact(
    settings: Settings, name: str, contents: Mapping[str, str | bytes], caption: str, records: Sequence[Path]
) -> None:
    """Write figures/<preset>/<name>.<ending> for each of the contents, and <name>.json.
    The latter holds the caption, the settings, the checksum of each file, and of every record its copy in records/
    beside it and its provenance. The same records give the same bytes. The paths are printed.
    What is of one model that was asked for alone is shown and not written, since tables and figures are of all; nor is
    what would overwrite the project's own by what rests on other settings than its preset's, or on rounded weights."""
    asked = settings.model_dump(mode="json", exclude=NOT_OF_THE_RESULT)
    rests_on = {record: read_json(record) for record in records}
    if reason := _why_not_saved(settings, asked, [*rests_on.values()]):
        print(f"{name} is not saved: it would {reason}")
        return
    folder, sources, files = settings.figures, [], {}
    for record, known in rests_on.items():
        copy = f"records/{known['model']}.{known['kind']}.json"
        write_atomically(folder / copy, record.read_bytes())
        made = {key: value for key, value in known["provenance"].items() if key != "finished"}
        sources.append({"file": copy, "provenance": made})
    for ending, content in contents.items():
        write_atomically(folder / f"{name}.{ending}", content)
        files[f"{name}.{ending}"] = checksum(folder / f"{name}.{ending}")
    sidecar = {"kind": "artefact", "name": name, "caption": caption}
    write_json(folder / f"{name}.json", sidecar | {"settings": asked, "files": files, "records": sources})
    written = [folder / file for file in (*files, f"{name}.json")]
    print("saved", ", ".join(path.relative_to(folder.parents[1]).as_posix() for path in written))


def _why_not_saved(settings: Settings, asked: dict[str, Any], rests_on: Sequence[dict[str, Any]]) -> str:
    """Empty where nothing speaks against it."""
    if settings.model:
        return f"be of {settings.model} alone"
    if settings.preset not in preset_names() or settings.figures != ROOT / "figures" / settings.preset:
        return ""
    meant = flat(load_preset(settings.preset).model_dump(mode="json", exclude=NOT_OF_THE_RESULT))
    overwrite = f"overwrite that of {settings.preset}, "
    if changed := [field for field, value in flat(asked).items() if value != meant[field]]:
        told = f"with another {', '.join(changed)}; name an output_folder, or make a preset of your own"
        return overwrite + told
    along = map(read_json, (PRETRAINED / settings.preset).glob("*/record.json"))
    rounded = {one["weights"] for one in along if "rounding" in one}
    if any(not rounded.isdisjoint(np.atleast_1d(known["weights"])) for known in rests_on):
        return f"{overwrite}by what its rounded weights show; name an output_folder"
    return ""
