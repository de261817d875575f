"""What a GPU says of the library, in three parts that each end by the clock, well within nine minutes.

part1   numbers beside the CPU's in float64, peak memory beside what the plan says, seconds and launches of a step
part2   MoE and Immunity trained on CIFAR-10 in bfloat16, for as many epochs as fit; their weights in half precision
part3   the paper's attacks, heat-map scores and adaptive attacks on what part2 left

Run with `python benchmarks/on_gpu.py part1 --images FOLDER --out FOLDER`. Every finding is printed and lies in
OUT/<part>.json at once; one that fails leaves its error, and the next goes on. `immunity_lib` and what it needs is all
that must be there. `--tiny` rehearses the same on any machine, in minutes of one core.
"""

import copy
import json
import os
import platform
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, a script sees its own folder alone

import torch
from torch import Tensor

from immunity_lib import evaluate, scores, train
from immunity_lib.attacks import Effort, attack_images, fold
from immunity_lib.data import Dataset, images, load_dataset
from immunity_lib.data.batches import ImageSet, evaluation_batches
from immunity_lib.files import read_tensors, write_json, write_tensors
from immunity_lib.heatmaps import expert_heatmaps, is_empty
from immunity_lib.moe import GateVerdicts, ImmunityMoE, verdicts
from immunity_lib.recipe import Recipe

STARTED = time.monotonic() - time.process_time()  # with what it took to load all this
ROOT = Path(__file__).resolve().parents[1]
METHODS = ("moe", "immunity")
PAPER = ("fgsm", "bim", "mim", "pgd")
EPS, STEP = 8 / 255, 2 / 255
PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TimeIsUp(Exception):
    """What a finding was given has passed."""


class Findings:
    """What a part found, on disk after every finding, within the minutes it was given."""

    def __init__(self, path: Path, minutes: float, asked: dict[str, Any]) -> None:
        self.path, self.end = path, STARTED + 60 * minutes
        self.content: dict[str, Any] = {"part": path.stem, "asked": asked, "findings": {}, "finished": False}
        signal.signal(signal.SIGALRM, _time_is_up)
        # A kernel that hangs hears no signal
        self.watch = threading.Timer(self.left + 15, self._give_up)
        self.watch.daemon = True
        self.watch.start()

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def tell(self, name: str, found: Any) -> None:
        """One finding, printed and kept."""
        self.content["findings"][name] = found
        self.content["seconds"] = round(time.monotonic() - STARTED, 1)
        write_json(self.path, self.content)
        text = json.dumps(found)
        print(f"{name}: {text if len(text) < 400 else text[:400] + ' ...'}", flush=True)

    def find(self, name: str, look: Callable[[], Any], most: float = 600.0) -> Any:
        """What `look` returns, told; None where it fails, or takes more than the `most` seconds or those left."""
        started, seconds, found = time.monotonic(), min(most, self.left), None
        if seconds <= 1:
            return self.tell(name, {"error": "left out, no time was left"})
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            found = look()
        except TimeIsUp:
            told = {"error": f"not done after {seconds:.0f} s"}
        except Exception as error:  # of any kind: the findings after it are worth their time
            told = {"error": f"{type(error).__name__}: {error}"[:1500]}
        else:
            told = found
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if PLACE.type == "cuda":
            with suppress(RuntimeError):  # after an error in a kernel, nothing works any more
                torch.cuda.empty_cache()
        if told is not None:
            took = {"took": round(time.monotonic() - started, 1)}
            self.tell(name, told | took if isinstance(told, dict) else told)
        return found

    def close(self) -> None:
        self.watch.cancel()
        self.content["finished"] = True
        self.content["seconds"] = round(time.monotonic() - STARTED, 1)
        write_json(self.path, self.content)

    def _give_up(self) -> None:
        self.tell("given up", f"after {time.monotonic() - STARTED:.0f} s, with something that would not end")
        for job in Job.running:
            job.end()
        os._exit(1)


def _time_is_up(*_: object) -> None:
    raise TimeIsUp


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    told: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    told["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if PLACE.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        told |= {"gpu": about.name, "memory": about.total_memory, "capability": f"{about.major}.{about.minor}"}
        told |= {"multiprocessors": about.multi_processor_count, "cuda": torch.version.cuda}
        told |= {"cudnn": torch.backends.cudnn.version(), "kernels": torch.cuda.get_arch_list()}
        told["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    flags = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return told | {"device": PLACE.type, "tf32 as PyTorch sets it": flags}


def _output(*command: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20).strip()
    return None


def set_tf32(allowed: bool) -> None:
    """Whether float32 may be rounded to ten bits before it is multiplied."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def wait() -> None:
    if PLACE.type == "cuda":
        torch.cuda.synchronize()


def make_recipe(method: str, precision: str = "float32", **changes: Any) -> Recipe:
    """Of preset cifar10, but for what is given; sets the flags of its precision: "float32", "tf32" or "bfloat16"."""
    set_tf32(precision == "tf32")
    losses = {"moe": {"beta": 0.0, "gamma": 0.0}, "immunity": {"beta": 1.0, "gamma": 100.0}}[method]
    known = {
        "dataset": "cifar10", "expert": "resnet18", "width": 0.25, "batch_size": 64, "learning_rate": 0.1,
        "schedule": "one-cycle", "gradient_clip": 5.0, "rotation": 0.0, "epochs": 12,
    }  # fmt: skip
    return Recipe(**known | losses | {"precision": "bfloat16" if precision == "bfloat16" else "float32"} | changes)


def read_recipe(known: dict[str, Any]) -> Recipe:
    """A recipe from what `as_json` made of it."""
    return Recipe(**known | {name: Fraction(known[name]) for name in ("eps", "step_size")})


def dataset_of(folder: str, **counts: Any) -> Dataset:
    """CIFAR-10 from parquet files in the folder, or in cifar10/ in it; without a folder Parts-10, which is made."""
    if not folder:
        return load_dataset("parts10", **counts)
    path = Path(folder)
    if not any(path.glob("*.parquet")):
        return load_dataset("cifar10", path, **counts)
    # A folder under the name that the library looks for
    with tempfile.TemporaryDirectory() as link:
        Path(link, "cifar10").symlink_to(path.resolve())
        return load_dataset("cifar10", link, **counts)


def without_contents() -> Dataset:
    """What a model needs to know of CIFAR-10."""
    return Dataset("cifar10", images.CLASS_NAMES["cifar10"], *images.STATISTICS["cifar10"], (), "shapes alone", {})


def some_images(count: int) -> tuple[Tensor, Tensor]:
    """Images of Parts-10 and their labels, on the CPU."""
    parts = load_dataset("parts10", train_images=count, validation_images=0, test_images=1).splits["train"]
    ((batch, labels),) = evaluation_batches(parts, count)
    return batch, labels


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-300)).item()


# Part 1: numbers


def compare_losses(expert: str, width: float, count: int, experts: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Losses, heat maps, scores and gradients of one batch, in each precision, against float64 on the CPU."""
    recipe = make_recipe("immunity", expert=expert, width=width, experts=experts, batch_size=count)
    model = train.build_model(recipe, without_contents())
    batch, labels = some_images(count)
    wanted: dict[str, Any] = {}

    def measure(model: ImmunityMoE, batch: Tensor, labels: Tensor, recipe: Recipe) -> dict[str, Any]:
        loss = train.training_loss(model.train(), batch, labels, recipe, recipe.warmup_epochs)
        loss.total.backward()
        gradients = {name: one.grad for name, one in model.named_parameters()}
        maps = expert_heatmaps(model, batch, labels)
        found = {name: getattr(loss, name) for name in vars(loss)}
        found |= {one.__name__: one(maps) for one in SCORES}
        return found | {"maps": maps, "gradients": gradients}

    def reference() -> dict[str, Any]:
        double = copy.deepcopy(model).double()
        wanted.update(measure(double, batch.double(), labels, recipe))
        return {name: one.item() for name, one in wanted.items() if isinstance(one, Tensor) and one.ndim == 0}

    def beside(precision: str, place: torch.device) -> dict[str, Any]:
        recipe = make_recipe("immunity", precision, expert=expert, width=width, experts=experts, batch_size=count)
        found = measure(copy.deepcopy(model).to(place), batch.to(place), labels.to(place), recipe)
        gradients, exact = found.pop("gradients"), wanted["gradients"]
        apart = {name: relative(found[name], wanted[name]) for name in found}
        whole = (torch.cat([one[name].double().cpu().flatten() for name in exact]) for one in (gradients, exact))
        apart["gradients"] = relative(*whole)
        largest = max(one.norm().item() for one in exact.values())
        # Of those that are more than rounding themselves
        names = [name for name in exact if exact[name].norm() > 1e-6 * largest]
        apart["worst gradient"] = max(relative(gradients[name], exact[name]) for name in names)
        return apart

    yield "float64 on the CPU", reference
    yield "float32 on the CPU", partial(beside, "float32", torch.device("cpu"))  # what rounding alone does
    for precision in ("float32", "tf32", "bfloat16"):
        yield precision, partial(beside, precision, PLACE)


SCORES = (scores.independence_score, scores.causality_score, scores.mutual_information)


@cache
def trained_model() -> ImmunityMoE:
    """Immunity on Parts-10 as it comes with the project, on the CPU."""
    folder = ROOT / "pretrained" / "demo" / "parts10-immunity-resnet18-standard-seed0"
    recipe = read_recipe(json.loads((folder / "record.json").read_text())["recipe"])
    parts = load_dataset("parts10", train_images=recipe.train_images, test_images=1)
    model = train.build_model(recipe, parts)
    model.load_state_dict(read_tensors(folder / "model.safetensors")[0])
    return model.eval()


def compare_attack(attack: str, gate: Any, count: int, steps: int) -> dict[str, Any]:
    """Points of an attack and accuracies under it, against float64 on the CPU from the same start."""
    parts = load_dataset("parts10", train_images=1, validation_images=0, test_images=count).splits["test"]
    ((batch, labels),) = evaluation_batches(parts, count)
    model, budget = trained_model(), {"eps": EPS, "step_size": STEP, "steps": steps}

    def start(points: Tensor, low: float, high: float) -> Tensor:
        """The same random numbers on every device."""
        drawn = torch.rand(points.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        return points.copy_(low + (high - low) * drawn)

    def measure(model: ImmunityMoE, batch: Tensor, labels: Tensor) -> tuple[Tensor, GateVerdicts]:
        with patch.object(torch.Tensor, "uniform_", start):
            points = attack_images(model, batch, labels, attack, gate, **budget)
        with torch.no_grad():
            return points, verdicts(model.expert_outputs(points), labels)

    points, right = measure(fold(model).double(), batch.double(), labels)
    found = {"float64 on the CPU": right.accuracy._asdict()}
    for precision in ("float32", "tf32"):
        set_tf32(precision == "tf32")
        ours, theirs = measure(fold(model).to(PLACE), batch.to(PLACE), labels.to(PLACE))
        apart = (ours.double().cpu() - points).abs()
        found[precision] = theirs.accuracy._asdict() | {
            # The sign of a gradient near zero is rounding's, and a pixel then goes another way
            "pixels elsewhere": (apart > 1e-4).double().mean().item(),
            "verdicts otherwise": (theirs.switched.cpu() != right.switched).double().mean().item(),
        }
    set_tf32(False)
    return found


def compare_resumed(count: int, experts: int) -> dict[str, Any]:
    """A training that is stopped after an epoch, and goes on, against two that are not."""
    data = load_dataset("parts10", train_images=count, validation_images=50, test_images=1)
    changes = {"dataset": "parts10", "width": 0.125, "epochs": 2, "batch_size": 32, "experts": experts}
    recipe = make_recipe("immunity", **changes)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "other", "stopped"):
            if name == "stopped":
                with patch.object(train, "progress_line", side_effect=KeyboardInterrupt):
                    with suppress(KeyboardInterrupt):
                        train.train(recipe, data, Path(folder, name), device=PLACE)
            model, log = train.train(recipe, data, Path(folder, name), device=PLACE)
            found.append((torch.cat([one.detach().flatten() for one in model.parameters()]), log[-1]["loss"]))
    (one, first), (other, second), (stopped, third) = found
    losses = {"undisturbed": [first, second], "stopped": third}
    apart = {"two undisturbed": relative(other, one), "stopped and undisturbed": relative(stopped, one)}
    return {"last loss": losses, "weights apart": apart}


# Part 1: memory


def cost_of(recipe: Recipe) -> dict[str, int]:
    """Of the plan; read from its file, since the study's package needs more than the library."""
    plan = runpy.run_path(str(ROOT / "study" / "graph" / "cost.py"))
    return plan["cost_of"](recipe, len(images.CLASS_NAMES["cifar10"]))


def peak(work: Callable[[], object]) -> float | None:
    """Megabytes of the GPU that the work held at most."""
    if PLACE.type != "cuda":
        work()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    wait()
    return round(torch.cuda.max_memory_allocated() / 1e6, 1)


def measure_memory(method: str, changes: dict[str, Any], measured: int) -> dict[str, Any]:
    """Peak of each phase of a model, beside the plan's."""
    recipe = make_recipe(method, **changes)
    model = train.build_model(recipe, without_contents()).to(PLACE)
    optimiser = train.make_optimiser(model, recipe)
    batch, labels = (one.to(PLACE) for one in some_images(recipe.batch_size))
    held_out = load_dataset("parts10", train_images=1, validation_images=measured, test_images=1).splits["validation"]
    ((many, theirs),) = evaluation_batches(held_out, measured, PLACE)

    def step() -> None:
        for _ in range(2):  # the second with momentum
            _step(train.training_loss, model.train(), batch, labels, recipe, optimiser)
        optimiser.zero_grad()

    budget = {"eps": EPS, "step_size": STEP, "steps": 2}
    target = fold(model)
    found: dict[str, Any] = {
        "plan (MB)": round(cost_of(recipe)["memory"] / 1e6, 1),
        "training step": peak(step),
        "diagnosis": peak(lambda: train.diagnose(model, held_out, recipe)),
        "attack": peak(lambda: attack_images(target, many, theirs, "pgd", "switch", **budget)),
        "scores": peak(lambda: expert_heatmaps(model, many, theirs)),
    }
    peaks = [found[phase] for phase in ("training step", "diagnosis", "attack", "scores") if found[phase]]
    return found | ({"peak over plan": round(max(peaks) / found["plan (MB)"], 2)} if peaks else {})


def _step(loss: Callable, model: ImmunityMoE, batch: Tensor, labels: Tensor, recipe: Recipe, optimiser: Any) -> None:
    parts = loss(model, batch, labels, recipe, recipe.warmup_epochs)
    optimiser.zero_grad()
    parts.total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
    optimiser.step()


# Part 1: speed


def make_step(method: str, precision: str, mode: str, changes: dict[str, Any]) -> Callable[[], None]:
    """A training step, of a batch that is on the GPU; mode: "eager", "compiled" or "graph", a CUDA graph of that."""
    recipe = make_recipe(method, precision, **changes)
    torch.manual_seed(0)
    model = train.build_model(recipe, without_contents()).to(PLACE).train()
    optimiser = train.make_optimiser(model, recipe)
    batch = torch.rand(recipe.batch_size, 3, 32, 32, device=PLACE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(recipe.batch_size, device=PLACE) % 10
    loss: Callable = train.training_loss
    if mode != "eager":
        if PLACE.type == "cuda":
            loss = train.compiled_loss(**({"mode": "reduce-overhead"} if mode == "graph" else {}))
        else:  # a rehearsal, without the minutes that kernels take
            loss = train.compiled_loss(backend="aot_eager")

    def step() -> None:
        if mode == "graph":
            optimiser.zero_grad()  # gradients that lie in the graph are gone with its next run
            torch.compiler.cudagraph_mark_step_begin()
        _step(loss, model, batch, labels, recipe, optimiser)

    return step


def time_step(step: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Seconds of a step that has been warmed up, repeated for so many seconds."""
    wait()
    times, started = [], time.perf_counter()
    while time.perf_counter() - started < seconds or not times:
        before = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - before)
    return {"seconds a step": median(times), "fastest": min(times), "steps": len(times)}


def count_launches(step: Callable[[], None]) -> dict[str, float]:
    """Kernels and copies that a step makes the GPU run, and the seconds that they take; on a CPU, its operations."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = PLACE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        wait()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # An optimiser's step is marked beside the kernels that it starts
    events = [one for one in profiler.events() if one.device_type == kind and not one.name.startswith("Optimizer")]
    found = {"launches": len(events)}
    return found | {"kernel seconds": sum(one.time_range.elapsed_us() for one in events) / 1e6} if on_gpu else found


def measure_step(
    method: str, precision: str, mode: str, changes: dict[str, Any], seconds: float, profiled: bool = True,
    ready: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """A step's time, images a second, launches, and the share of it that the GPU was busy; `ready` is called when it
    has been warmed up."""
    step = make_step(method, precision, mode, changes)
    for _ in range(4):
        step()
    wait()
    ready()
    found = time_step(step, seconds)
    found["images a second"] = round(changes["batch_size"] / found["seconds a step"], 1)
    if profiled:
        found |= count_launches(step)
    if "kernel seconds" in found:
        found["busy"] = round(found["kernel seconds"] / found["seconds a step"], 3)
    return found


class Job:
    """Another process that makes a step ready, and times it when it is told to: it compiles while others measure."""

    running: list["Job"] = []

    def __init__(self, **asked: Any) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--step", json.dumps(asked)]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, start_new_session=True
        )
        Job.running.append(self)

    def answer(self) -> dict[str, Any]:
        """Its next line; waits for it."""
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"it ended: {' | '.join(self.said.read().strip().splitlines()[-3:])[:800]}")
        return json.loads(line)

    def go(self) -> None:
        """Let it time its step."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(ValueError):
            Job.running.remove(self)


def run_job(asked: dict[str, Any]) -> int:
    """The other side of `Job`: answers on its standard output."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    started = time.perf_counter()

    def ready() -> None:
        print(json.dumps({"seconds to be ready": round(time.perf_counter() - started, 1)}), flush=True)
        sys.stdin.readline()

    print(json.dumps(measure_step(**asked, ready=ready)), flush=True)
    return 0


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def measure_together(count: int, asked: dict[str, Any]) -> dict[str, Any]:
    """So many trainings on one GPU at once."""
    started: list[Job] = []
    try:
        started += [Job(**asked) for _ in range(count)]
        for job in started:
            job.answer()
        for job in started:
            job.go()
        rates = [job.answer()["images a second"] for job in started]
    finally:
        for job in started:
            job.end()
    return {"jobs": count, "images a second, all": round(sum(rates), 1), "each": [round(one, 1) for one in rates]}


def part1(findings: Findings, options: Any) -> None:
    tiny = options.tiny
    networks = {"resnet18": 0.0625 if tiny else 0.25, "googlenet": 0.0625 if tiny else 1.0}
    experts = {"experts": 2 if tiny else 5}

    def changes(expert: str, batch: int) -> dict[str, Any]:
        return {"expert": expert, "width": networks[expert], "batch_size": 4 if tiny else batch} | experts

    # They compile while others compute, and are timed when nothing else runs
    slow = [
        ("immunity", "resnet18", "bfloat16", 128, "compiled"), ("immunity", "resnet18", "bfloat16", 128, "graph"),
        ("moe", "resnet18", "bfloat16", 128, "compiled"), ("immunity", "resnet18", "float32", 32, "compiled"),
        ("immunity", "googlenet", "bfloat16", 128, "compiled"), ("immunity", "googlenet", "bfloat16", 128, "graph"),
    ]  # fmt: skip
    seconds, compiling = 0.3 if tiny else 1.5, {}
    for method, expert, precision, batch, mode in slow[: 1 if tiny else None]:
        asked = {"method": method, "precision": precision, "mode": mode, "seconds": seconds, "profiled": True}
        name = f"step/{method}/{expert}/{precision}/{batch}/{mode}"
        compiling[name] = Job(**asked, changes=changes(expert, batch))

    for expert, width in networks.items():
        for name, look in compare_losses(expert, width, 4 if tiny else 32, **experts):
            findings.find(f"numbers/{expert}/{name}", look, 60)
    for title, gate in {"trained": "trained", "uniform": "uniform", "permuted": (4, 2, 0, 1, 3)}.items():
        for attack in PAPER if title == "trained" or not tiny else PAPER[:1]:
            look = partial(compare_attack, attack, gate, *((4, 2) if tiny else (64, 10)))
            findings.find(f"attack/{attack}/{title}", look, 40)
    findings.find("resumed", partial(compare_resumed, 64 if tiny else 512, **experts), 60)
    for expert, method in product(networks, METHODS):
        look = partial(measure_memory, method, changes(expert, 64), 8 if tiny else evaluate.BATCH)
        findings.find(f"memory/{expert}/{method}", look, 40)

    def timed(job: Job) -> dict[str, Any]:
        job.go()
        return job.answer()

    for name, job in compiling.items():
        kept = 30 if tiny else 230  # for what does not compile
        if findings.find(f"{name}/ready", job.answer, max(findings.left - kept, 2.0)) is None:
            job.end()
    for name, job in compiling.items():
        if job in Job.running:
            findings.find(name, partial(timed, job), 30)
            job.end()
    for expert, batch, method in product(networks, (4,) if tiny else (32, 128, 256), METHODS):
        for precision in ("float32", "bfloat16") if tiny else ("float32", "tf32", "bfloat16"):
            look = partial(measure_step, method, precision, "eager", changes(expert, batch), seconds)
            findings.find(f"step/{method}/{expert}/{precision}/{batch}/eager", look, 30)
    asked = {"method": "immunity", "precision": "bfloat16", "mode": "eager", "seconds": 0.5 if tiny else 5.0}
    asked |= {"profiled": False, "changes": changes("resnet18", 64)}
    for count in (2,) if tiny else (1, 2, 4):
        findings.find(f"together/{count}", partial(measure_together, count, asked), 60)


# Part 2


def part2(findings: Findings, options: Any) -> None:
    tiny, started = options.tiny, time.monotonic()
    counts = {"train_images": 64, "validation_images": 16, "test_images": 32} if tiny else {}
    data = dataset_of(options.images, **counts)
    about = {"name": data.name, "source": data.source, "seconds": round(time.monotonic() - started, 1)}
    findings.tell("data", about | {split: len(one) for split, one in data.splits.items()})
    size = {"experts": 2, "width": 0.0625, "batch_size": 16} if tiny else {"width": options.width, "batch_size": 128}
    recipes = {one: make_recipe(one, "bfloat16", dataset=data.name, **size) for one in METHODS}

    trials = {one: findings.find(f"{one}/trial", partial(try_epoch, recipes[one], data), 90) for one in METHODS}
    if None in trials.values():
        return
    seconds = {one: found["seconds an epoch"] for one, found in trials.items()}
    kept = 20.0 if tiny else 45.0  # for what is measured of each
    # As many for both, and all of them in time: one-cycle ends with its last epoch
    epochs = int(0.9 * (findings.left - kept * len(METHODS)) / sum(seconds.values()))
    epochs = max(1, min(epochs, 2 if tiny else 200))
    findings.tell("epochs", epochs)
    for number, method in enumerate(METHODS):
        later = METHODS[number + 1 :]
        most = findings.left - kept * (1 + len(later)) - sum(epochs * seconds[one] for one in later)
        with tempfile.TemporaryDirectory() as folder:
            recipe, place = replace(recipes[method], epochs=epochs), Path(folder, method)
            findings.find(f"{method}/training", partial(train_and_tell, recipe, data, place), max(most, 2.0))
            look = partial(measure_trained, recipe, data, place, options.out / f"{method}.safetensors", tiny)
            findings.find(f"{method}/accuracy", look, kept)


def try_epoch(recipe: Recipe, data: Dataset) -> dict[str, float]:
    """Seconds of an epoch, from a second one on fewer images: the first one warms up."""
    few, held_out = data.splits["train"].first(30 * recipe.batch_size), data.splits["validation"]
    share = len(few) / len(data.splits["train"])  # of what is trained on, and of what is looked at after it
    smaller = replace(
        data, splits=data.splits | {"train": few, "validation": held_out.first(max(1, round(share * len(held_out))))}
    )
    with tempfile.TemporaryDirectory() as folder:
        _, log = train.train(replace(recipe, epochs=2, warmup_epochs=0.0), smaller, Path(folder, "trial"), device=PLACE)
    return {"seconds an epoch": log[-1]["seconds"] / share}


def train_and_tell(recipe: Recipe, data: Dataset, folder: Path) -> dict[str, Any]:
    _, log = train.train(recipe, data, folder, device=PLACE)
    return {"recipe": recipe.as_json(), "log": log}


def measure_trained(recipe: Recipe, data: Dataset, folder: Path, weights: Path, tiny: bool) -> dict[str, Any]:
    """Accuracies of what the last whole epoch left, in float32, and its weights in half precision."""
    set_tf32(False)
    tensors, notes = read_tensors(folder / train.CHECKPOINT)  # also of a training that ran out of time
    known = {name.removeprefix("model."): one for name, one in tensors.items() if name.startswith("model.")}
    halves = {name: one.half() if one.is_floating_point() else one for name, one in known.items()}
    model = build(recipe, data, halves)
    write_tensors(weights, halves, {"recipe": recipe.as_json(), "data": data.name, "log": notes["log"]})
    test, count = data.splits["test"], 16 if tiny else 500
    clean = evaluate.verdicts_over_gates(model, evaluation_batches(test, evaluate.BATCH, PLACE))
    found = {"epochs": len(notes["log"]), "of": recipe.epochs, "log": notes["log"], "clean": clean.accuracy._asdict()}
    few, budget = test.select(test.balanced(count)), {"eps": EPS, "step_size": STEP, "steps": 3 if tiny else 20}
    for gate in ("switch", "uniform"):
        attacked = evaluate.verdicts_under_attack(model, few, "pgd", gate, **budget, device=PLACE)
        found[f"pgd on {gate}"] = attacked.accuracy._asdict()
    return found


def build(recipe: Recipe, data: Dataset, weights: dict[str, Tensor]) -> ImmunityMoE:
    """A trained model, to be evaluated."""
    model = train.build_model(recipe, data)
    model.load_state_dict(weights)  # halves become floats
    return model.to(PLACE).eval()


# Part 3


def part3(findings: Findings, options: Any) -> None:
    tiny = options.tiny
    set_tf32(False)
    counts = {"train_images": 1, "validation_images": 0, "test_images": 32 if tiny else None}
    data, models = dataset_of(options.images, **counts), {}
    for method in METHODS:
        tensors, notes = read_tensors(options.out / f"{method}.safetensors")
        if notes["data"] != data.name:
            raise SystemExit(f"{method} was trained on {notes['data']}, and these images are {data.name}: --images")
        models[method] = build(read_recipe(notes["recipe"]), data, tensors)
    test, budget = data.splits["test"], {"eps": EPS, "step_size": STEP, "steps": 3 if tiny else 20}
    rows = test.balanced(16 if tiny else 1000)
    findings.tell("images", {"data": data.name, "source": data.source, "rows": rows.tolist()})
    for method, attack in product(METHODS, PAPER):
        look = partial(attack_by_paper, models[method], test.select(rows), attack, budget)
        findings.find(f"{method}/{attack}", look, 60)
    for method in METHODS:
        findings.find(f"{method}/scores", partial(measure_scores, models[method], test), 60)
    few = test.select(rows[: 8 if tiny else 500])
    ((batch, labels),) = evaluation_batches(few, len(few), PLACE)
    for number, method in enumerate(METHODS):
        share = (findings.left - 5) / (len(METHODS) - number)
        look = partial(measure_adaptively, findings, method, models, batch, labels, share, tiny)
        findings.find(f"{method}/adaptive", look, max(share, 2.0))


def told_of(found: GateVerdicts) -> dict[str, Any]:
    """Accuracies, and of each image how many permutations of the gate are wrong."""
    return {"accuracy": found.accuracy._asdict(), "wrong gates": (~found.switched).sum(1).tolist()}


def attack_by_paper(model: ImmunityMoE, images: ImageSet, attack: str, budget: dict[str, Any]) -> dict[str, Any]:
    return told_of(evaluate.verdicts_under_attack(model, images, attack, "switch", **budget, device=PLACE))


def measure_scores(model: ImmunityMoE, test: ImageSet) -> dict[str, Any]:
    """Heat-map scores and accuracy on all test images."""
    maps, right = [], []
    for batch, labels in evaluation_batches(test, evaluate.BATCH, PLACE):
        maps.append(expert_heatmaps(model, batch, labels).cpu())
        right.append(evaluate.verdicts_over_gates(model, [(batch, labels)]))
    heat, found = torch.cat(maps), GateVerdicts.join(right)
    told = {one.__name__: one(heat).item() for one in SCORES} | {"accuracy": found.accuracy._asdict()}
    return told | {"empty maps": is_empty(heat).float().mean(0).tolist()}


def measure_adaptively(
    findings: Findings, method: str, models: dict[str, ImmunityMoE], batch: Tensor, labels: Tensor, seconds: float,
    tiny: bool,
) -> dict[str, Any]:  # fmt: skip
    """Every adaptive attack, AutoAttack with the steps that the seconds allow; what is done is told at once."""
    steps, judged = (2, 4) if tiny else (20, 200)
    budget = {"eps": EPS, "step_size": STEP, "steps": steps}
    target = fold(models[method])
    attack_images(target, batch[:judged], labels[:judged], "pgd", "uniform", **budget)  # warms up
    wait()
    started = time.perf_counter()
    attack_images(target, batch[:judged], labels[:judged], "pgd", "uniform", **budget)
    wait()
    gradient = (time.perf_counter() - started) / steps
    # Of a step of AutoAttack: 19 gradients on each of two gates, and 128 forward passes, each a third of one
    others = 35 * steps * gradient * len(batch) / judged
    affordable = int((0.7 * seconds - others) / (80 * gradient))
    effort = Effort(EPS, STEP, steps, (1, 5), 1 if tiny else max(5, min(affordable, 100)), judged)
    surrogates = {name: one for name, one in models.items() if name != method}

    def keep(name: str, found: GateVerdicts, told: dict) -> None:
        findings.tell(f"{method}/adaptive/{name}", told | told_of(found))

    _, summary = evaluate.evaluate_adaptively(
        models[method], batch, labels, effort, surrogates, tell=lambda line: None, keep=keep
    )
    return {"images": len(batch), "effort": vars(effort)} | summary


PARTS = {part.__name__: part for part in (part1, part2, part3)}


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python benchmarks/on_gpu.py", description="What a GPU says of the library.")
    parser.add_argument("part", choices=PARTS, nargs="?", help="which: numbers and speed, training, attacks")
    told = "of CIFAR-10 as parquet files, in it or in cifar10/ in it (without: Parts-10, which is made)"
    parser.add_argument("--images", default="", metavar="FOLDER", help=told)
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), metavar="FOLDER", help="for findings and weights")
    parser.add_argument("--minutes", type=float, default=8, help="after which the part has ended (default: 8)")
    parser.add_argument("--width", type=float, default=0.25, help="of what part2 trains (default: 0.25)")
    parser.add_argument("--tiny", action="store_true", help="rehearse at tiny sizes, with or without a GPU")
    parser.add_argument("--step", help=SUPPRESS)  # what it asks of itself
    options = parser.parse_args(arguments)
    if options.step:
        return run_job(json.loads(options.step))
    if options.part is None:
        parser.error(f"which part? One of {', '.join(PARTS)}")
    for name, most in (("minutes", 60), ("width", 4)):
        if not 0 < getattr(options, name) <= most:
            parser.error(f"--{name} is {getattr(options, name)}; it must be above 0 and at most {most}")
    if options.images and not any(any(Path(options.images).glob(one)) for one in ("*.parquet", "cifar10/*.parquet")):
        parser.error(f"--images: no *.parquet and no cifar10/*.parquet in {options.images!r}")
    if missing := [one for one in METHODS if not (options.out / f"{one}.safetensors").is_file()]:
        if options.part == "part3":
            parser.error(f"--out: no {missing[0]}.safetensors in '{options.out}'; part2 with the same --out leaves it")
    if PLACE.type != "cuda" and not options.tiny:
        print("PyTorch finds no GPU; --tiny rehearses without one", file=sys.stderr)
        return 2
    asked = {name: str(one) if isinstance(one, Path) else one for name, one in vars(options).items() if name != "step"}
    findings = Findings(options.out / f"{options.part}.json", options.minutes, asked)
    findings.tell("machine", machine())
    try:
        PARTS[options.part](findings, options)
    finally:
        for job in list(Job.running):
            job.end()
    failed = [name for name, one in findings.content["findings"].items() if isinstance(one, dict) and "error" in one]
    findings.close()
    took = f"{time.monotonic() - STARTED:.0f} s"
    print(f"{options.part} ended after {took}; {len(failed)} findings failed{': ' * bool(failed)}{', '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
