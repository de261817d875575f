"""The Dockerfile and its entry script: what can be said without building them, and (test-node) the image as a user of a
GPU node meets it, less the GPU: run without a network and with all but the mounted folder read-only."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from graph import wait_for

from study.settings import ROOT, load_preset
from study.store import read_json

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRY = ROOT / "container" / "entry.sh"
WORDS = {"reproduce", "lab", "papermill", "plan", "status", "site", "test"}


def entry(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a container would run it, with nothing of this machine's environment."""
    return subprocess.run(["sh", ENTRY, *arguments], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_the_base_is_pinned_and_the_user_not_root():
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE) == ["${BASE_IMAGE}"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.04", base)
    *_, user = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_entry_starts_what_exists():
    script = ENTRY.read_text()
    assert script.startswith("#!/bin/sh\n") and ENTRY.stat().st_mode & 0o111 == 0o111
    started = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (study[.\w]+)", script)]
    started += re.findall(r'python "\$project/(\S+)"', script)
    assert len(started) == 4 and all((ROOT / path).exists() for path in started), started


def test_help_lists_every_word_and_an_unknown_one_is_named_beside_them():
    known, unknown = entry("--help"), entry("reproduze", "--preset", "smoke")
    assert (known.returncode, unknown.returncode) == (0, 2)
    assert set(re.findall(r"^  ([a-z]+) ", known.stdout, re.MULTILINE)) == WORDS
    assert unknown.stderr.startswith("error: unknown word 'reproduze'")
    assert known.stdout in unknown.stderr


@pytest.mark.skipif(Path("/results").exists(), reason="this machine has a folder /results")
@pytest.mark.parametrize("word", sorted(WORDS - {"plan", "test"}))
def test_without_a_mounted_folder_it_says_how_to_mount_one(word):
    outcome = entry(word)
    assert outcome.returncode == 2 and '-v "$PWD/results:/results"' in outcome.stderr
    assert re.search(r"user \d+ may write to", outcome.stderr)


# --- the image

TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
# Asks the server a page, from within its container, and prints the status
ASK = "import sys, requests; print(requests.get('http://127.0.0.1:8888' + sys.argv[1]).status_code)"


class Image:
    """The built image, and one folder that all of its containers mount."""

    def __init__(self, storage: Path, results: Path):
        self.results = results
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(storage / "storage.conf"),
            "CONTAINERS_CONF": str(storage / "containers.conf"),
        }

    def podman(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["podman", *arguments], env=self.environment, capture_output=True, text=True)

    def run(self, *arguments: str, options=()) -> subprocess.CompletedProcess[str]:
        done = self.podman(
            "run", "--network=none", "--read-only", f"--volume={self.results}:/results",
            *(options or ["--rm"]), "localhost/immunity", *arguments,
        )  # fmt: skip
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        return done

    def start(self, name: str, *arguments: str) -> None:
        """Run in the background, until `podman rm`."""
        assert self.run(*arguments, options=["--detach", f"--name={name}"]).returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory, request):
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip(f"needs Linux, root and {', '.join(TOOLS)}; missing: {missing}")
    kept = request.config.getoption("--image-storage")
    storage = kept or tmp_path_factory.mktemp("storage")
    results = tmp_path_factory.mktemp("results")
    os.chown(results, 1000, 1000)  # the image's user
    image = Image(Path(storage), results)
    try:
        subprocess.run([ROOT / "tests" / "container" / "build.sh", storage], check=True)
        yield image
    finally:
        image.podman("rm", "--all", "--force")
        if not kept:
            image.podman("rmi", "--all", "--force")
            shutil.rmtree(storage)


@pytest.fixture(scope="module")
def stopped(image):
    """A run that is asked to stop once a model is trained: its status, and how long that took."""
    image.start("stopped", "reproduce", "--preset", "smoke")
    wait_for(lambda: [*image.results.glob("runs/smoke/models/*/record.json")], 600)
    began = time.monotonic()
    image.podman("stop", "--time=60", "stopped")
    seconds = time.monotonic() - began
    return int(image.podman("inspect", "--format={{.State.ExitCode}}", "stopped").stdout), seconds


@pytest.fixture(scope="module")
def finished(image, stopped):
    """The same command, run to its end, and the records of the models that were made before it."""
    records = image.results.glob("runs/smoke/models/*/record.json")
    before = {record: record.read_bytes() for record in records}
    return image.run("reproduce", "--preset", "smoke"), before


@pytest.mark.node
def test_asked_to_stop_it_ends_by_itself_and_soon(stopped):
    status, seconds = stopped
    assert status == 143 and seconds < 30, "neither killed (137) nor done (0)"


@pytest.mark.node
def test_the_same_command_goes_on_to_every_table_and_figure(image, finished):
    done, before = finished
    assert done.returncode == 0
    settings = load_preset("smoke", output_folder=str(image.results))
    for table in ("table1", "table2", "table3", "claims"):
        assert (settings.figures / f"{table}.csv").stat().st_size > 0
        assert read_json(settings.figures / f"{table}.json")["caption"] in done.stdout
    assert before and all(path.read_bytes() == record for path, record in before.items())


@pytest.mark.node
def test_papermill_runs_one_notebook(image, finished):
    model = "parts10-immunity-googlenet-standard-seed0"
    given = ["-p", "preset", "smoke", "-p", "model", model, "-p", "interactive", "False"]
    assert image.run("papermill", "notebooks/02_training.ipynb", "/results/out.ipynb", *given).returncode == 0
    assert model in (image.results / "out.ipynb").read_text()


@pytest.mark.node
def test_the_fast_tests_pass(image):
    done = image.run("test")
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout)


@pytest.mark.node
def test_lab_wants_its_token_and_serves_copies_that_run(image, finished):
    image.start("lab", "lab")
    try:
        printed = r"http://127\.0\.0\.1:8888/lab/tree/notebooks/05_heatmaps\.ipynb\?token=(\w{48})"
        log = lambda: image.podman("logs", "lab")  # noqa: E731
        wait_for(lambda: re.search(printed, log().stdout + log().stderr), 120)
        (token,) = set(re.findall(printed, log().stdout + log().stderr))

        def status(page: str) -> str:
            return image.podman("exec", "lab", "python", "-c", ASK, page).stdout.strip()

        assert status("/api/contents") == "403"
        assert status(f"/api/contents?token={token}") == "200"
        assert status(f"/lab/tree/notebooks/05_heatmaps.ipynb?token={token}") == "200"
    finally:
        image.podman("stop", "--time=20", "lab")
    copy = "notebooks/01_expert_selection.ipynb"
    assert 'output_folder = \\"/results\\"' in (image.results / copy).read_text()
    run = ["papermill", f"/results/{copy}", "/results/copy.ipynb", "-p", "preset", "smoke"]
    assert image.run(*run, "-p", "interactive", "False").returncode == 0
