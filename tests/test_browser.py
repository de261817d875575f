"""Notebooks, the explorer, its page and the site, as a reader meets them: in a real browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from immunity_lib.records import provenance, write_record
from immunity_lib.settings import ROOT, load_preset
from immunity_lib.site import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="needs a browser on the PATH: install chromium (Debian: apt-get install chromium)",
    ),
]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
TOKEN = "for-this-test-alone"


@contextmanager
def server(command, port, state):
    """A server of notebooks, with nothing of the user's own configuration, until it is left."""
    environment = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(state / "lab-settings"),
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "PYTHONPATH": str(ROOT),
    }
    with open(state / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=state)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:  # no page is asked for: that would cost Voila one of its kernels
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def jupyterlab(folder, state, theme="JupyterLab Light"):
    """JupyterLab on a folder; yields its address."""
    settings = state / "lab-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", str(folder), "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={TOKEN}"]
    with server(command, port, state):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def browser_page(width=1300, **options):
    """A page of a fresh browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 1000}, **options)
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def run_all(page, address, notebook):
    """Open a notebook and have all of its cells run. It lies in the folder that is served."""
    page.goto(f"{address}/lab/tree/{notebook.name}?token={TOKEN}")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")
    # The notebook's own indicator says idle before the kernel is connected
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    page.click("text=Run")
    page.click('.lm-Menu-item[data-command="runmenu:run-all"]')


def wait_for_the_end(page, notebook, seconds):
    """Save the notebook until every cell has been run, or one has failed."""
    # The kernel is idle between two cells as well, so the saved notebook is asked
    deadline = time.monotonic() + seconds
    while not came_to_its_end(notebook) and time.monotonic() < deadline:
        page.wait_for_timeout(2000)
        page.keyboard.press("Control+s")
    page.wait_for_selector("text=Python 3 (ipykernel) | Idle")
    page.keyboard.press("Control+s")  # with what the last cell put out
    page.wait_for_timeout(2000)


def came_to_its_end(notebook):
    """Whether every cell has been run, or one of them has failed."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return all(c["execution_count"] for c in cells) or any(errors(c) for c in cells)


def errors(cell):
    return [output for output in cell["outputs"] if output["output_type"] == "error"]


def written(folder, name, **parameters):
    """A notebook of the project in a folder, with some of its parameters changed."""
    folder.mkdir(exist_ok=True)
    content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "".join(
        f"\n{parameter} = {value!r}" for parameter, value in parameters.items()
    )
    notebook = folder / f"{name}.ipynb"
    notebook.write_text(json.dumps(content))
    return notebook


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", ["00_start_here", "02_training"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, state):
    """With its defaults, but for the preset, which is the smallest, and where the results go."""
    folder = tmp_path / "notebooks"
    notebook = written(folder, name, preset="smoke", output_folder=str(tmp_path))
    with jupyterlab(folder, state) as address, browser_page() as page:
        run_all(page, address, notebook)
        wait_for_the_end(page, notebook, seconds=300)
    done = json.loads(notebook.read_text())
    for cell in done["cells"]:
        if cell["cell_type"] == "code":
            assert not errors(cell)
            assert cell["execution_count"], "a cell was not run"
    pictures = [out for cell in done["cells"] for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})]  # fmt: skip
    assert pictures, "no figure is shown"


def shown(page):
    """What the explorer says, and its pictures."""
    views = page.locator("div.explorer")
    texts = [text for text in views.all_inner_texts()]
    pictures = page.eval_on_selector_all("div.explorer img", "all => all.map(one => one.src)")
    return texts, pictures


def changed_by(page, act, what):
    """Do something with the explorer and wait until its words, or pictures, are others."""
    part = ["words", "pictures"].index(what)
    before = shown(page)[part]
    act()
    deadline = time.monotonic() + 60
    while shown(page)[part] == before:
        assert time.monotonic() < deadline, f"the {what} did not change"
        page.wait_for_timeout(50)


def slide(page, name, key="ArrowRight"):
    """Press a key on the slider of that name."""
    slider = page.locator(".widget-hslider", has=page.locator(f"label:text-is('{name}')"))
    slider.locator(".noUi-handle").focus()
    page.keyboard.press(key)


def choose(page, name, option):
    """In the drop-down of that name."""
    chooser = page.locator(".widget-dropdown", has=page.locator(f"label:text-is('{name}')"))
    chooser.locator("select").select_option(option)


def use_the_explorer(page):
    """Everything that moves, and what it has to move."""
    page.wait_for_selector("div.explorer >> text=under this gate")
    page.wait_for_selector("text=/^ready/")
    page.locator(".explorer-gallery").scroll_into_view_if_needed()
    changed_by(page, lambda: page.click(".explorer-image-25"), "pictures")
    slide(page, "step")
    changed_by(page, lambda: [slide(page, "step") for _ in range(7)], "pictures")
    changed_by(page, lambda: slide(page, "eps"), "pictures")
    changed_by(page, lambda: slide(page, "gate", "End"), "words")
    changed_by(page, lambda: slide(page, "expert"), "pictures")
    changed_by(page, lambda: page.check("text=maps over the image"), "pictures")
    changed_by(page, lambda: page.check("text=outline the true parts"), "pictures")
    changed_by(page, lambda: choose(page, "CAM method", "Layer-CAM"), "pictures")
    changed_by(page, lambda: choose(page, "compared with", "none"), "words")
    letter = {"name": "letter.txt", "mimeType": "text/plain", "buffer": b"no image"}
    with page.expect_file_chooser() as chooser:
        page.click("text=own image")
    chooser.value.set_files(letter)
    page.wait_for_selector("text=letter.txt cannot be read as an image")
    assert page.locator("text=/Error|Traceback/").count() <= 1  # of the letter


def take_picture(page, path):
    """Of the whole explorer, at the width that the page has; with a record beside it."""
    width = page.viewport_size["width"]
    page.keyboard.press("Control+b")  # fold the side bar
    page.set_viewport_size({"width": width, "height": 2400})
    page.click(".explorer-image-8")
    choose(page, "CAM method", "Grad-CAM, eq (3)")
    choose(page, "compared with", "MoE, standard training")
    page.uncheck("text=maps over the image")
    slide(page, "eps", "ArrowLeft")
    slide(page, "step", "End")
    page.wait_for_selector("div.explorer >> text=MoE, standard training, expert 2")
    page.wait_for_timeout(3000)
    page.locator(".widget-vbox", has=page.locator(".explorer-gallery")).first.screenshot(path=path)
    taken = {"kind": "screenshot", "notebook": "05_heatmaps", "width": width}
    write_record(path.with_suffix(".json"), taken | {"provenance": provenance()})


@pytest.mark.parametrize(("theme", "width"), [("Light", 1300), ("Dark", 800)])
def test_the_explorer_moves_in_jupyterlab(theme, width, tmp_path, state, pytestconfig):
    """From opening the notebook to moved maps, nothing trained: the weights come with it."""
    pictures = pytestconfig.getoption("screenshots") or tmp_path
    picture = pictures / f"explorer-{theme.lower()}.png"
    folder = tmp_path / "notebooks"
    notebook = written(folder, "05_heatmaps", output_folder=str(tmp_path))
    lab = jupyterlab(folder, state, f"JupyterLab {theme}")
    with lab as address, browser_page(width) as page:
        started = time.monotonic()
        run_all(page, address, notebook)
        page.wait_for_selector(".jp-OutputArea img")
        print(f"first picture after {time.monotonic() - started:.1f} s")
        page.wait_for_selector("div.explorer >> text=under this gate", state="attached")
        print(f"explorer after {time.monotonic() - started:.1f} s")
        use_the_explorer(page)
        take_picture(page, picture)
        print(f"explorer used after {time.monotonic() - started:.1f} s")
        wait_for_the_end(page, notebook, seconds=300)
    done = json.loads(notebook.read_text())
    assert not any(errors(cell) for cell in done["cells"] if cell["cell_type"] == "code")


def test_the_explorer_moves_on_voila_s_page(tmp_path, state):
    """As `make explorer` serves it."""
    notebook = written(tmp_path / "notebooks", "05_heatmaps", output_folder=str(tmp_path))
    port = free_port()
    recipe = re.search(r"voila notebooks/05_heatmaps.ipynb (.*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "voila", str(notebook), *recipe[1].split(), "--no-browser"]
    with server([*command, f"--port={port}"], port, state), browser_page() as page:
        page.goto(f"http://127.0.0.1:{port}")
        use_the_explorer(page)


def test_the_site_works_from_a_file_without_a_network(tmp_path):
    """With what the demo made, and a notebook full of equations."""
    settings = load_preset("demo", output_folder=str(tmp_path))
    shutil.copytree(ROOT / "figures" / "demo", settings.figures)
    (settings.runs / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "notebooks" / "00_start_here.ipynb", settings.runs / "notebooks")
    problems = []
    with browser_page(width=800) as page:
        page.context.set_offline(True)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.goto(build(settings).as_uri())
        page.click("text=00_start_here")
        equation = page.locator(".equation math").first
        assert equation.bounding_box()["height"] > 10, "an equation is drawn"
        page.click("text=All notebooks and figures")
        page.click("text=Step through")
        page.wait_for_selector("text=under this gate")
        canvas = "document.querySelectorAll('canvas')[1].toDataURL()"
        view = page.locator("#view")
        for control, key in (("#step", "End"), ("#state", "End"), ("#subject", "ArrowDown")):
            before = page.evaluate(canvas), view.inner_text()
            page.focus(control)
            page.keyboard.press(key)
            page.wait_for_timeout(500)
            after = page.evaluate(canvas), view.inner_text()
            assert before[1] != after[1], control
            assert (before[0] != after[0]) == (control != "#state"), control
    assert not problems
