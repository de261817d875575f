"""The set-up files agree with each other, and the Makefile fails with words."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from study.settings import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
LINES = re.findall(r"^(\S+)==(\S+) (?:; (.*) )?\\$", LOCK, re.MULTILINE)  # name, version, where it is installed


def locked(**environment: str) -> dict[str, str]:
    """What the lock installs, here or in an environment that differs from this one as told."""
    found = [one for *one, marker in LINES if not marker or Marker(marker).evaluate(environment)]
    assert len(found) == len(dict(found)), "each package once"
    return dict(found)


LOCKED = locked()
OVERRIDDEN = {Requirement(line).name for line in PYPROJECT["tool"]["uv"]["override-dependencies"]}
LIGHT = PYPROJECT["project"]["dependencies"]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def make(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, free of the make that may have started these tests."""
    outer = "MAKEFLAGS", "MAKELEVEL", "PYTHON", "TORCH"  # of a make that runs these tests
    environment = {k: v for k, v in os.environ.items() if k not in outer} | variables
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def script(path: Path, text: str) -> Path:
    """Write what can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def is_locked(requirement: Requirement, versions: dict[str, str] = LOCKED) -> bool:
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    ("system", "os_name", "machine"),
    [("linux", "posix", "x86_64"), ("linux", "posix", "aarch64"), ("darwin", "posix", "arm64"),
     ("win32", "nt", "AMD64")],
)  # fmt: skip
def test_direct_dependencies_are_locked_at_satisfying_versions_on_every_system(python, system, os_name, machine):
    versions = locked(
        python_version=python, python_full_version=f"{python}.9", sys_platform=system, os_name=os_name,
        platform_machine=machine,
    )  # fmt: skip
    for line in [*LIGHT, *EXTRAS["study"], *EXTRAS["test"]]:
        assert is_locked(Requirement(line), versions), line
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains(f"{python}.9")
    assert any(name.startswith("nvidia-") for name in versions) == (system == "linux")


def test_lock_holds_all_that_a_locked_package_needs_with_its_hashes_from_any_index():
    """Installed with --no-deps, nothing else would notice a missing package."""
    for name in LOCKED:
        for requirement in map(Requirement, requires(name) or []):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and requirement.name not in OVERRIDDEN:
                assert is_locked(requirement), f"{name} needs {requirement}"
    with_hash = re.findall(r"^(\S+)==.*\\\n +--hash=sha256:[0-9a-f]{64}", LOCK, re.MULTILINE)
    assert with_hash == [name for name, *_ in LINES]
    assert "://" not in LOCK and not re.search(r"^--", LOCK, flags=re.MULTILINE)


def test_conda_environment_and_citation_say_the_same_as_the_project():
    from_conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{PYPROJECT['project']['requires-python']}" in from_conda
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {key: citation[key] for key in ("cff-version", "type")} == {"cff-version": "1.2.0", "type": "software"}
    assert {"message", "title", "authors"} <= citation.keys() and isinstance(citation["date-released"], date)
    assert all(citation[key] == PYPROJECT["project"][key] for key in ("version", "license"))


def imported(package: str) -> set[str]:
    """The packages that the modules of one of ours import, wherever in them."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names


DISTRIBUTION = {
    "PIL": "pillow", "pytorch_grad_cam": "grad-cam", "yaml": "pyyaml",
    "IPython": "jupyterlab", "traitlets": "jupyterlab", "filelock": "torch",  # these come along
}  # fmt: skip


@pytest.mark.parametrize(
    ("package", "lines", "also"),
    [
        ("immunity_lib", LIGHT, {"immunity_lib", "pandas", "pyarrow"}),  # CIFAR in parquet files
        ("study", LIGHT + EXTRAS["study"], {"immunity_lib", "study"}),
    ],
)
def test_what_a_package_imports_is_among_its_dependencies(package, lines, also):
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    needed = {canonicalize_name(DISTRIBUTION.get(module, module)) for module in imported(package) - also}
    assert needed <= declared


def test_D14_a_wheel_has_both_packages_and_their_data(tmp_path):
    for name in ("pyproject.toml", "immunity_lib", "study", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", "dist"], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = [path for name in ("immunity_lib", "study") for path in (ROOT / name).rglob("*.*")]
    assert {path.relative_to(ROOT).as_posix() for path in ours if "__pycache__" not in path.parts} <= inside


@pytest.fixture
def fresh_checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def install_commands(text):
    """What a text installs packages with, each a line."""
    return re.findall(r"(?:pip install|conda env create) [^&;`\n]*", text.replace("\\\n", " "))


def test_D9_nothing_is_installed_or_built_with_what_has_no_hash(fresh_checkout):
    """A package that is published as source alone is built with the setuptools of the lock, which comes first. The
    container is made by the same rule."""
    dry = make("--dry-run", f"PYTHON={sys.executable}", ".venv/.installed", folder=fresh_checkout).stdout
    first, *then = install_commands(dry)
    assert "--require-hashes" in first and "setuptools" in LOCKED and len(then) == 2
    for command in then:
        assert "--require-hashes" in command or command.strip().endswith("-e ."), command
        assert {"--no-deps", "--no-build-isolation"} <= set(command.split()), command
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert not install_commands(dockerfile) and dockerfile.count(" .venv/.") == 2


def test_mybinder_installs_by_the_makefile_s_rule_for_processors_and_names_the_kernel_of_the_notebooks():
    script = ROOT / ".binder/postBuild"
    text, runtime = script.read_text(), (ROOT / ".binder/runtime.txt").read_text().strip()
    assert os.access(script, os.X_OK) and not install_commands(text)
    assert "make TORCH=cpu PYTHON=python3 .venv/.installed" in text and "--name" not in text
    assert Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier.contains(runtime.split("-")[1])


def test_pytorch_can_be_another_build_than_that_of_the_lock(fresh_checkout):
    """All else is installed from the lock, but for what only its PyTorch needs."""
    dry = make("--dry-run", f"PYTHON={sys.executable}", "TORCH=cpu", ".venv/.installed", folder=fresh_checkout).stdout
    *_, rest, torch, ours = install_commands(dry)
    assert "--require-hashes -r .venv/without_torch.lock" in rest and "--torch-backend=cpu" in torch
    assert "--require-hashes" not in torch and ours.strip().endswith("-e .")
    (fresh_checkout / ".venv").mkdir()
    for command in re.findall(r"^sed .*", dry, re.MULTILINE):
        subprocess.run(["sh", "-c", command], cwd=fresh_checkout, check=True)
    kept = re.findall(r"^(\S+)==", (fresh_checkout / ".venv/without_torch.lock").read_text(), re.MULTILINE)
    gone = {name for name, *_ in LINES} - set(kept)
    assert {"torch", "torchvision", "triton"} < gone and all(re.match("torch|triton|nvidia|cuda", one) for one in gone)
    (versions,) = re.findall(r"\$\((sed .*)\)", dry)
    said = subprocess.run(["sh", "-c", versions], cwd=fresh_checkout, capture_output=True, text=True).stdout.split()
    assert said == [f"{name}=={LOCKED[name]}" for name in ("torch", "torchvision")]


def test_what_checks_no_hashes_is_said():
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "environment.yml", *(ROOT / "docs").glob("*.md")]
    commands = {one.strip() for page in pages for one in install_commands(page.read_text())}
    unchecked = {one for one in commands if not re.search("--require-hashes|--no-build-isolation -e [.]$", one)}
    assert unchecked == {"conda env create -f environment.yml", "pip install ."}
    said = (ROOT / "SECURITY.md").read_text().partition("Not promised")[2]
    assert "conda's own packages" in said
    assert all(f"`{one}`" in said for one in ("environment.yml", "pip install .", "make TORCH=cpu", "PROFILE"))


def test_help_is_the_default_and_lists_every_target(fresh_checkout):
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make (\S+) +\S", make(folder=fresh_checkout).stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets.split())


def test_wrong_python_is_named(fresh_checkout):
    pretend = "import sys; sys.version, sys.version_info = '3.10.13 (main)', (3, 10); exec(sys.argv[2])"
    python = script(fresh_checkout / "python3.10", f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$@"\n')
    outcome = make(".venv/.installed", f"PYTHON={python}", folder=fresh_checkout)
    assert f"Python 3.11, 3.12 or 3.13 is needed, but {python} is Python 3.10.13" in outcome.stderr
    assert outcome.returncode != 0 and not (fresh_checkout / ".venv").exists()


@pytest.fixture
def pretended_make(fresh_checkout):
    """Runs make where the environment is installed and its Python only tells its arguments and variables."""
    tell = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    script(fresh_checkout / ".venv/bin/python", f"#!{sys.executable}\n{tell}")
    for stamp in (".packages", ".installed"):
        (fresh_checkout / ".venv" / stamp).touch()
    return lambda *told, **variables: json.loads(make("--silent", *told, folder=fresh_checkout, **variables).stdout)


def test_a_python_that_does_not_run_is_passed_over(fresh_checkout):
    """As those of pyenv that are not chosen."""
    for name, status in (("python3.12", 127), ("python3.13", 0), ("python3.11", 0)):
        script(fresh_checkout / name, f"#!/bin/sh\nexit {status}\n")
    path = f"{fresh_checkout}:{os.environ['PATH']}"
    asked = make("--dry-run", ".venv/.installed", folder=fresh_checkout, PATH=path).stdout
    assert "|| python3.13 -m venv" in asked


def test_D3_neighbours_what_a_shell_says_of_python_and_of_installing_is_not_for_this_environment(pretended_make):
    """As the modules of a cluster say it; mirrors are obeyed."""
    names = "PYTHONOPTIMIZE PYTHONWARNINGS PIP_USER PIP_TARGET UV_TARGET UV_REQUIRE_HASHES UV_NO_BUILD".split()
    told = dict.fromkeys([*names, "PYTHONPATH", "PIP_INDEX_URL"], "/elsewhere") | {"PYTHONUTF8": "0"}
    _, kept = pretended_make("plan", **told)
    assert not {"PYTHONPATH", *names} & kept.keys()
    assert kept["PIP_INDEX_URL"] == "/elsewhere" and kept["PYTHONUTF8"] == "1"
    breaking = {"PYTHONHOME", "PIP_PREFIX", "UV_PREFIX"}  # Python itself, so that they are not tried
    assert breaking <= set((ROOT / "Makefile").read_text().split())


def test_D15_the_makefile_passes_its_variables_on_whatever_is_in_their_names(pretended_make, fresh_checkout):
    names = ("DATA", "OUTPUT", "PROFILE", "PRESET")
    given = {name: f'my {name}\'s "x" `touch ran` ; touch ran & (ü)' for name in names}
    command, _ = pretended_make("reproduce", "JOBS=3", "-j8", *(f"{name}={value}" for name, value in given.items()))
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options == {f"--{name.lower()}": value for name, value in given.items()} | {"--jobs": "3"}
    assert not (fresh_checkout / "ran").exists()
    assert "smoke" in pretended_make("smoke", "PRESET=demo")[0] and pretended_make("smoke", "-j8")[0][3] == "smoke"
