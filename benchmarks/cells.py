"""The networks of cells, ours against their graph evaluated edge by edge, as it is published.

Goal: no slower. There, every edge has a ReLU of its own, and the RobNets compute their absent
edges as zeros.
"""

from unittest.mock import patch

import torch

from benchmarks.sides import ratios, take_turns
from immunity_lib import build_expert
from immunity_lib.cells import UNRECTIFIED, Cell

IMAGES, ROUNDS, WIDTH, LAYERS = 32, 7, 0.25, 8


def edge_by_edge(cell: Cell, outputs, absent_edges: bool):
    """What `Cell.forward` computes, without sharing or leaving out anything."""
    before_last, last = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
    states = [
        cell.preprocess_before_last(cell.relu(before_last)),
        cell.preprocess_last(cell.relu(last)),
    ]
    for sources, operations in zip(cell.sources, cell.operations, strict=True):
        total = 0.0
        for source, operation in zip(sources, operations, strict=True):
            state = states[source]
            read = state if isinstance(operation, UNRECTIFIED) else cell.relu(state)
            total = total + operation(read)
        for source in set(range(len(states))) - set(sources) if absent_edges else ():
            stride = states[source].shape[2] // total.shape[2]
            total = total + 0.0 * states[source][:, :, ::stride, ::stride]
        states.append(total)
    return last, torch.cat(states[2:], 1)


def main() -> None:
    for name in ("pdarts", "advrush", "robnet-free", "robnet-large-v1"):
        torch.manual_seed(0)
        network = build_expert(name, 10, WIDTH, layers=LAYERS)
        network = network.to(memory_format=torch.channels_last).train()
        images = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        absent_edges = name.startswith("robnet")

        def forward(network=network, images=images) -> torch.Tensor:
            with torch.no_grad():
                return network(images)

        def step(network=network, images=images) -> None:
            network.zero_grad()
            network(images).sum().backward()

        def published(call, absent_edges=absent_edges) -> None:
            with patch.object(Cell, "forward", lambda cell, state: edge_by_edge(cell, state, absent_edges)):
                call()

        seconds = take_turns(
            {
                "forward": forward,
                "published forward": lambda forward=forward: published(forward),
                "step": step,
                "published step": lambda step=step: published(step),
            },
            ROUNDS,
        )
        found = [ratios(seconds[f"published {what}"], seconds[what]) for what in ("forward", "step")]
        print(f"{name}, width {WIDTH}, {LAYERS} cells: edge by edge, a forward pass takes {found[0]}")
        print(f"    our time, a training step {found[1]}")
