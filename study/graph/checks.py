"""What stands in the way of a preset on this machine: all that can be known before anything is computed, at once."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage, which

import psutil
import torch
from torch.utils._triton import has_triton

from immunity_lib.data import Dataset
from immunity_lib.recipe import Recipe
from immunity_lib.train import is_compiled
from study import catalogue
from study.graph.cost import cost_of
from study.settings import ROOT, Settings, read_yaml
from study.store import ASKED, chosen_device, find_record, load_data, names_gpus, will_have_weights

PROFILES = ROOT / "profiles"
BYTES_ON_DISK = 12  # for each parameter: weights, and in training a checkpoint with momentum
BYTES_OF_LIBRARIES = 10**9  # of a process that has loaded them


def look_ahead(
    settings: Settings, profile: str, jobs: int | None, jobs_per_gpu: int = 1
) -> tuple[Path | None, dict[str, Dataset], list[str] | None]:
    """The folder of the profile, the data sets by name, and the GPUs of this machine (None where a scheduler has the
    jobs). Raises ValueError with all that stands in the way, as far as it can be known before anything is computed."""
    wrong, data, costs, folder = [], {}, {}, None

    @contextmanager
    def noted(about: str = "") -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            wrong.append(about + str(error))

    if set(settings.output_folder) & set("{}"):
        told = f"output folder {settings.output_folder!r} has a brace in its name, which stands for a wildcard"
        wrong.append(f"{told} in the graph; choose another")
    with noted():
        folder = profile_folder(profile) if profile else None
    for name in settings.datasets:  # downloaded once, before models train beside each other
        with noted():
            data[name] = load_data(settings, name)
    for name in catalogue.trained_models(settings):
        if name.dataset in data and not find_record(settings, name, "training").exists():
            with noted(f"{name.model_copy(update={'seed': 0})} cannot be trained: "):
                costs[name] = cost_of(catalogue.recipe_of(settings, name), len(data[name.dataset].class_names))
    if settings.pretrained:
        wrong += missing_weights(settings)
    existing = next(path for path in (settings.runs, *settings.runs.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        wrong.append(f"{existing} is no folder that can be written to; choose another output folder")
    needed = sum(BYTES_ON_DISK * cost["parameters"] for cost in costs.values())
    if (free := disk_usage(existing).free) < needed:
        told = f"{existing} has {free / 1e9:.1f} GB left, and the models need {needed / 1e9:.1f} GB"
        wrong.append(f"{told}; make room, or choose another output folder")
    gpus = None if folder and submits(folder) else []
    if gpus is not None:
        with noted():
            chosen_device()  # of a driver that is too old, only this knows
            gpus = visible_gpus()
        wrong += missing_kernels() if gpus else []
        recipes = [catalogue.recipe_of(settings, name) for name in costs]
        wrong += missing_compilers(recipes, torch.device("cuda" if gpus else "cpu"))
        taken = {name: cost["least" if gpus else "memory"] + BYTES_OF_LIBRARIES for name, cost in costs.items()}
        largest = max(taken, key=taken.__getitem__, default=None)
        room, where = memory(bool(gpus))
        if largest and (needed := taken[largest]) > room:
            told = f"{largest} takes {needed / 1e9:.1f} GB of memory, but {where} has {room / 1e9:.1f} GB"
            wrong.append(f"{told}; lower width, experts or batch_size, or take a larger machine")
        elif largest:
            beside, option = (jobs_per_gpu, "--jobs-per-gpu") if gpus else (jobs or os.cpu_count() or 1, "JOBS")
            beside = min(beside, len(costs))
            if needed * beside > room:
                told = f"{beside} jobs beside each other may take {needed * beside / 1e9:.1f} GB of memory"
                print(f"{told} of {room / 1e9:.1f} GB; {option}={int(room // needed)} surely fits", file=sys.stderr)
    if wrong:
        raise ValueError("\n".join(dict.fromkeys(wrong)))  # each once
    return folder, data, gpus


def missing_weights(settings: Settings) -> list[str]:
    """A sentence where something is to be measured of models that came with the project without their weights. To train
    them again, beside what was measured of the first training, would mix two."""
    lacking = []
    for kind in ASKED:
        for name in catalogue.measured_models(settings, kind):
            others = catalogue.surrogates(settings, name) if kind == "adaptive" else []
            if not (find_record(settings, name, kind).exists() or will_have_weights(settings, [name, *others])):
                lacking.append(f"{kind} of {name}")
    if not lacking:
        return []
    told = f"{len(lacking)} measurements ({lacking[0]}, ...) need weights of models that came along without them"
    return [f"{told}; leave PRETRAINED out, which trains all anew"]


def memory(on_gpu: bool) -> tuple[int, str]:
    """Bytes of the smallest GPU in use, or of this machine as far as a container may have it; and whose they are."""
    from torch.cuda import device_count, get_device_properties

    if on_gpu:
        return min((one.total_memory, one.name) for one in map(get_device_properties, range(device_count())))
    limit, room = Path("/sys/fs/cgroup/memory.max"), psutil.virtual_memory().total
    with suppress(OSError, ValueError):  # no such limit
        room = min(room, int(limit.read_text()))
    return room, "this machine"


def missing_kernels() -> list[str]:
    """A sentence for each GPU in use that PyTorch was not built for."""
    from torch import __version__, cuda

    built, found = re.findall("(sm|compute)_([0-9]+)([0-9])", " ".join(cuda.get_arch_list())), []
    for gpu in range(cuda.device_count()):
        major, minor = cuda.get_device_capability(gpu)
        if not any(
            # Kernels run on later GPUs of the same major number, what is compiled at run time on all later ones
            (int(one) == major and int(least) <= minor) or (kind == "compute" and int(one) < major)
            for kind, one, least in built
        ):
            told = f"GPU {gpu} ({cuda.get_device_name(gpu)}) has compute capability {major}.{minor}, for which"
            remedy = "install one that has, or leave the GPU out with CUDA_VISIBLE_DEVICES"
            found.append(f"{told} PyTorch {__version__} has no kernels; {remedy}")
    return found


def missing_compilers(recipes: Iterable[Recipe], device: torch.device) -> list[str]:
    """A sentence for what lacks where a recipe's steps are compiled."""
    if not any(is_compiled(recipe, device) for recipe in recipes):
        return []
    lacking = ["Triton, for GPUs of compute capability 7.0 or more,"] * (device.type == "cuda" and not has_triton())
    if not any(map(which, filter(None, (os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang")))):
        lacking.append("a C++ compiler, as g++,")
    return [
        f"steps are to be compiled, for which {one} is not here; install it, or set compiled: false" for one in lacking
    ]


def profile_folder(name: str) -> Path:
    """Where a profile lies, by its name in profiles/ or by its path; ValueError lists the names."""
    for folder in (PROFILES / name, Path(name).expanduser()):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = ", ".join(sorted(path.parent.name for path in PROFILES.glob("*/config.yaml")))
    raise ValueError(f"unknown profile {name!r}; valid names: {known}, or the path of a folder")


def submits(profile: Path) -> bool:
    """Whether a profile hands its jobs to a scheduler, rather than running them on this machine."""
    return read_yaml(profile / "config.yaml").get("executor", "local") != "local"


def gives_gpus(profile: Path) -> bool:
    """Whether a cluster gives a GPU to what computes: unless its profile says that training gets none."""
    asked = str(read_yaml(profile / "config.yaml").get("set-resources"))
    return not re.search(r"\btrain\b[^}]*?gpu\W+0\b", asked)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: by number or UUID. ValueError where it
    names some and there is none: what is meant for them would take days on the CPU."""
    from torch.cuda import device_count, is_available

    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), device_count() if is_available() else 0
    if named and names_gpus(named) and not count:
        told = f"CUDA_VISIBLE_DEVICES is {named!r}, but PyTorch finds no GPU (see nvidia-smi for the driver)"
        raise ValueError(f"{told}; mend either, or choose the CPU by -1")
    names = [name.strip() for name in named.split(",")] if named else list(map(str, range(count)))
    # Of several slices, CUDA shows a process the first alone
    return names if names and names[0].startswith("MIG-") else names[:count]
