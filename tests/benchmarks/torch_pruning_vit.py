"""ViT-B in PyTorch, and how long Torch-Pruning takes from it to all of its groups; nothing where it is lacking."""

from __future__ import annotations

import time
from typing import Any


def seconds(*, repeats: int, dim: int = 768, heads: int = 12, layers: int = 12) -> list[float]:
    """Seconds from a built network to all groups, as `net.groups` has them; none where a package is lacking.

    Weights are allocated beforehand. Torch-Pruning runs the network once to follow its autograd graph.
    """
    try:
        import torch
        import torch_pruning
    except ImportError:
        return []
    network = _vit(torch, dim, heads, layers)
    image = torch.zeros(1, 3, 224, 224)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=image)
        groups = list(graph.get_all_groups(ignored_layers=[network.head]))
        found.append(time.perf_counter() - start)
        assert len(groups) > layers
    return found


def _vit(torch: Any, dim: int, heads: int, layers: int) -> Any:
    """The network of `bench_compaction.Vit`."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
            self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
            self.hidden, self.output = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

        def forward(self, x: Any) -> Any:
            y = self.norms[0](x)
            split = (*x.shape[:2], heads, dim // heads)
            q, k, v = (layer(y).reshape(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
            weights = torch.softmax(q @ k.transpose(-1, -2) * split[-1] ** -0.5, -1)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))
            return x + self.output(nn.functional.gelu(self.hidden(self.norms[1](x))))

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, dim, 16, 16)
            self.positions = nn.Parameter(torch.zeros(1, 196, dim))
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

        def forward(self, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.blocks(x)).mean(1))

    return Vit()
