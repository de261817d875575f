"""The set-up files agree with each other, and the Makefile fails with words."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"^(\S+)==(\S+)", LOCK, flags=re.MULTILINE))

OVERRIDDEN = {Requirement(line).name for line in PYPROJECT["tool"]["uv"]["override-dependencies"]}
DIRECT = PYPROJECT["project"]["dependencies"]
TEST_EXTRA = PYPROJECT["project"]["optional-dependencies"]["test"]


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, free of the make that may have started these tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def is_locked(requirement: Requirement) -> bool:
    version = LOCKED.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("line", [*DIRECT, *TEST_EXTRA])
def test_direct_dependency_is_locked_at_a_satisfying_version(line: str) -> None:
    assert is_locked(Requirement(line))


@pytest.mark.parametrize("name", LOCKED)
def test_lock_holds_all_that_a_locked_package_needs(name: str) -> None:
    """Installed with --no-deps, nothing else would notice a missing package."""
    needed = [Requirement(line) for line in requires(name) or []]
    for requirement in needed:
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in OVERRIDDEN:
            assert is_locked(requirement), f"{name} needs {requirement}"


def test_every_locked_package_has_hashes() -> None:
    with_hash = re.findall(r"^(\S+)==\S+ \\\n +--hash=sha256:[0-9a-f]{64}", LOCK, re.MULTILINE)
    assert with_hash == list(LOCKED)


def test_lock_names_no_index() -> None:
    assert "://" not in LOCK
    assert not re.search(r"^--", LOCK, flags=re.MULTILINE)


def test_conda_environment_lists_the_direct_dependencies() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *from_conda, from_pip = environment["dependencies"]
    assert from_pip == {"pip": DIRECT}
    assert "python=3.11" in from_conda
    assert PYPROJECT["project"]["requires-python"] == "==3.11.*"


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2402.18787"}]
    assert paper["url"].endswith("/2402.18787")
    assert len(paper["authors"]) == 6
    assert citation["version"] == PYPROJECT["project"]["version"]


def test_help_is_the_default_and_lists_every_target() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make (\S+) +\S", make().stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets.split())


@pytest.fixture
def fresh_checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_installing_is_skipped_when_up_to_date_and_starts_afresh_when_cut_off(
    fresh_checkout: Path,
) -> None:
    stamp = fresh_checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    assert make("--question", ".venv/.installed", folder=fresh_checkout).returncode == 1
    stamp.touch()
    assert make("--question", ".venv/.installed", folder=fresh_checkout).returncode == 0


def test_wrong_python_is_named(fresh_checkout: Path) -> None:
    python = fresh_checkout / "python3.10"
    pretend = "import sys; sys.version = '3.10.13 (main)'; exec(sys.argv[2])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$@"\n')
    python.chmod(0o755)
    outcome = make(".venv/.installed", f"PYTHON={python}", folder=fresh_checkout)
    assert outcome.returncode != 0
    assert f"Python 3.11 is needed, but {python} is Python 3.10.13" in outcome.stderr
    assert not (fresh_checkout / ".venv").exists()


def test_reproduce_passes_its_variables_on(fresh_checkout: Path) -> None:
    given = ("PRESET=paper", "DATA=my data", "JOBS=3")
    asked = make("--dry-run", "reproduce", *given, folder=fresh_checkout).stdout
    command = " ".join(asked[asked.index("-m immunity_lib.reproduce") :].replace("\\", "").split())
    assert command == '-m immunity_lib.reproduce --preset paper --data "my data" --jobs 3'
