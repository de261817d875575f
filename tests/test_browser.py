"""A notebook in JupyterLab, opened and run from top to bottom in a real browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest

from immunity_lib.settings import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium browser on the PATH"),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
TOKEN = "for-this-test-alone"


@contextmanager
def jupyterlab(folder, state):
    """JupyterLab on a folder, with nothing of the user's own configuration; yields its address."""
    settings = state / "lab-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(state / "lab-settings"),
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
    }
    command = [sys.executable, "-m", "jupyterlab", str(folder), "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={TOKEN}"]
    with open(state / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.wait(30)


def run_all(address, notebook, screenshot, seconds):
    """Run every cell of a notebook in the browser and save it; takes a picture of the end.

    notebook: its path; it lies in the folder that JupyterLab serves at the address.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/lab/tree/{notebook.name}?token={TOKEN}")
        page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")
        # The notebook's own indicator says idle before the kernel is connected
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
        page.click("text=Run")
        page.click('.lm-Menu-item[data-command="runmenu:run-all"]')
        # The kernel is idle between two cells as well, so the saved notebook is asked
        deadline = time.monotonic() + seconds
        while not came_to_its_end(notebook) and time.monotonic() < deadline:
            page.wait_for_timeout(2000)
            page.keyboard.press("Control+s")
        page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
        page.keyboard.press("Control+s")  # with what the last cell put out
        page.wait_for_timeout(2000)
        page.screenshot(path=screenshot)
        browser.close()


def came_to_its_end(notebook):
    """Whether every cell has been run, or one of them has failed."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return all(c["execution_count"] for c in cells) or any(errors(c) for c in cells)


def errors(cell):
    return [output for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.parametrize("name", ["00_start_here", "02_training"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    """With its defaults, but for the preset, which is the smallest, and where the results go."""
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    parameters = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    text = "".join(parameters["source"]).replace('preset = "demo"', 'preset = "smoke"')
    parameters["source"] = text.replace('output_folder = ""', f'output_folder = "{tmp_path}"')
    notebook = folder / f"{name}.ipynb"
    notebook.write_text(json.dumps(content))
    with jupyterlab(folder, state) as address:
        run_all(address, notebook, tmp_path / "end.png", seconds=300)
    done = json.loads(notebook.read_text())
    for cell in done["cells"]:
        if cell["cell_type"] == "code":
            assert not errors(cell)
            assert cell["execution_count"], "a cell was not run"
    pictures = [out for cell in done["cells"] for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})]  # fmt: skip
    assert pictures, "no figure is shown"
