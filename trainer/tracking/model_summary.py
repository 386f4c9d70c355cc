"""Pictures of a network for dashboards: the graph of its layers, and the distribution of each layer's weights."""

import math
from collections.abc import Iterable
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

BINS = 64


class Layer(NamedTuple):
    """One computation of a network."""

    name: str
    """As of its module, "layer1.0.conv1"; a function's is that of the module it is in, then its own."""
    kind: str
    """Class of the module, or name of the function."""
    inputs: list[str]
    """Names of the layers whose outputs it reads."""
    shape: list[int]
    """Of its output."""
    parameters: dict[str, list[int]]
    """Shape of each of its own parameters."""


class Distribution(NamedTuple):
    """Distribution of one parameter's values."""

    counts: list[int]
    """[BINS] values in each of the bins, which are equally wide."""
    edges: list[float]
    """[BINS + 1] from the least to the greatest value."""
    sum: float
    sum_squares: float

    @property
    def norm(self) -> float:
        return math.sqrt(self.sum_squares)


class _Tracer(fx.Tracer):
    """Records layers as wholes, those of our own classes too, so that no Python of theirs sees a placeholder."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


class _Shapes(fx.Interpreter):
    """Notes the shape of each output that is a tensor; torch's own `ShapeProp` imports sympy, for a second."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.of: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        first = output[0] if isinstance(output, tuple) and output else output  # of parts, as torch.split gives them
        if isinstance(first, Tensor):
            self.of[n] = list(first.shape)
        return output


def layers(network: nn.Module, images: Tensor) -> list[Layer]:
    """The layers of a network in evaluation, in the order of their computation, for `images` [B,3,H,W]."""
    tracer = _Tracer()
    graph = tracer.trace(network.eval())
    shapes = _Shapes(fx.GraphModule(network, graph))
    with torch.no_grad():
        shapes.run(images)
    names: dict[fx.Node, str] = {}
    found = []
    for node in graph.nodes:
        if node.op == "output" or node not in shapes.of:  # the size of an image is no layer
            continue
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        kind = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
        names[node] = _fresh(node.target if module else _within(node, kind), {*names.values()})
        parameters = {name: list(p.shape) for name, p in module.named_parameters()} if module else {}
        inputs = [names[source] for source in node.all_input_nodes if source in names]
        found.append(Layer(names[node], kind, inputs, shapes.of[node], parameters))
    return found


def _within(node: fx.Node, function: str) -> str:
    """Name of a function's call: below the module whose code calls it."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack", {})
    return ".".join(name for name in (*list(stack)[-1:], function) if name)


def _fresh(name: str, taken: set[str]) -> str:
    return next(tried for tried in chain([name], (f"{name}_{again}" for again in count(2))) if tried not in taken)


def distributions(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Distribution]:
    """Compute a distribution of each parameter by name, on its device; empty ones and those with a value not finite are left out.

    ZeRO-3 leaves a rank no values between steps.
    """
    found = {}
    for name, parameter in parameters:
        values = parameter.detach().float().flatten()
        if values.numel() == 0:
            continue
        low, high, total, squares = torch.stack([*values.aminmax(), values.sum(), values.dot(values)]).tolist()
        if not math.isfinite(squares):
            continue
        if low == high:  # as gamma at the start: a bin needs a width
            low, high = low - 0.5, high + 0.5
        counts = torch.histc(values, BINS, low, high).long().tolist()
        edges = [low + (high - low) * edge / BINS for edge in range(BINS + 1)]
        found[name] = Distribution(counts, edges, total, squares)
    return found
