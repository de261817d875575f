"""What can be said of the Dockerfile and its entry script without building them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from immunity_lib.settings import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRY = ROOT / "container" / "entry.sh"
WORDS = {"reproduce", "lab", "papermill", "plan", "status", "site", "test"}


def entry(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a container would run it, with nothing of this machine's environment."""
    return subprocess.run(
        ["sh", str(ENTRY), *arguments],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_the_base_can_be_replaced_and_is_pinned():
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE) == ["${BASE_IMAGE}"]
    assert re.fullmatch(r"debian:\d+\.\d+-slim", base)


def test_the_user_is_a_number_and_not_root():
    *_, user = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_nothing_in_it_is_secret_or_bound_to_one_builder():
    assert not re.search(r"secret|password|token|://|<<|--link|--mount|--network", DOCKERFILE, re.I)


def test_history_data_and_results_stay_out():
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "data", "runs"} <= set(left_out)


def test_the_entry_is_a_posix_script():
    assert ENTRY.read_text().startswith("#!/bin/sh\n") and ENTRY.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["sh", "-n", str(ENTRY)]).returncode == 0


def test_help_lists_every_word():
    outcome = entry("--help")
    assert outcome.returncode == 0
    assert set(re.findall(r"^  ([a-z]+) ", outcome.stdout, re.MULTILINE)) == WORDS


def test_an_unknown_word_is_named_beside_the_known_ones():
    outcome = entry("reproduze", "--preset", "smoke")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: unknown word 'reproduze'")
    assert entry("--help").stdout in outcome.stderr


@pytest.mark.skipif(Path("/results").exists(), reason="this machine has a folder /results")
@pytest.mark.parametrize("word", ["reproduce", "lab", "papermill", "status", "site"])
def test_without_a_mounted_folder_it_says_how_to_mount_one(word):
    outcome = entry(word)
    assert outcome.returncode == 2
    assert '-v "$PWD/results:/results"' in outcome.stderr
    assert re.search(r"user \d+ may write to", outcome.stderr)
