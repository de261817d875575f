"""Draw docs/imports.svg from the code: each module above those that it imports when it is loaded. Arrows that a chain
of others implies are left out. The same code gives the same bytes."""

import ast
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"immunity_lib": "#d9e8f6", "study": "#fbe6c8"}  # of packages, the lower one first


def import_graph() -> dict[str, set[str]]:
    """By the name of each module of both packages, those that it imports."""
    paths = [path for one in COLOURS for path in sorted((ROOT / one).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    graph = {name.removesuffix(".__init__"): set() for name in names}
    for path, imported in zip(paths, graph.values(), strict=True):
        for node in ast.parse(path.read_text()).body:
            for one in getattr(node, "names", ()):
                full = f"{getattr(node, 'module', '')}.{one.name}".strip(".")
                imported |= {full if full in graph else full.rpartition(".")[0]} & graph.keys()
    return graph


def longest_chain(name: str, graph: dict[str, set[str]], package: str = "") -> int:
    """How many modules the longest chain of imports has that begins with this one."""
    below = [longest_chain(one, graph, package) for one in graph[name] if one.startswith(package)]
    return 1 + max(below, default=0)


def draw(graph: dict[str, set[str]], path: Path) -> None:
    ground = max(longest_chain(name, graph) for name in graph if not name.startswith("study"))
    layer = {one: longest_chain(one, graph, one.split(".")[0]) for one in graph}
    layer |= {one: ground + layer[one] for one in graph if one.startswith("study")}
    under, lines = {}, set()
    for name in sorted(graph, key=layer.get):
        implied = set().union(*(under[one] for one in graph[name]))
        under[name] = graph[name] | implied
        for below in graph[name] - implied:  # with a point in each layer that the line passes
            passed = [(below, k) for k in range(layer[name] - 1, layer[below] - 1, -1)]
            lines |= set(pairwise([(name, layer[name]), *passed]))
    points = sorted({point for line in lines for point in line})
    rows = [[one for one in points if one[1] == k + 1] for k in range(max(layer.values()))]
    x = {one: float(k) for row in rows for k, one in enumerate(row)}
    for row in 20 * (rows + rows[::-1]):  # each point towards the middle of its neighbours
        row.sort(key=lambda one: fmean(x[b if a == one else a] for a, b in lines if one in (a, b)))
        x |= {one: (k + 0.5) / len(row) for k, one in enumerate(row)}
    axes = Figure(figsize=(11, 8)).add_axes((0.02, 0, 0.96, 1), ylim=(0.5, len(rows) + 0.5))
    axes.set_axis_off()
    for high, low in sorted(lines):
        tip, head = (low[1] + 0.17, "-|>") if low in layer.items() else (low[1], "-")
        style = {"arrowstyle": head, "color": "0.5", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x[low], tip), (x[high], high[1]), arrowprops=style)
    for name, height in sorted(layer.items() & set(points)):
        package, _, label = name.partition(".")
        box = {"boxstyle": "round", "facecolor": COLOURS[package], "edgecolor": "0.4"}
        axes.text(x[name, height], height, label or package, ha="center", va="center", bbox=box)
    with matplotlib.rc_context({"svg.hashsalt": "immunity", "svg.fonttype": "none"}):
        axes.figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(import_graph(), ROOT / "docs" / "imports.svg")
