"""A network split at a node: what runs above it, on the network's own parameters.

The part above is found by tracing the network's own forward with torch.fx, through the modules that
the node lies in and no others: all the rest are black boxes, so that what cannot be traced
elsewhere does no harm. It shares the network's modules, so that training the part trains the
network.
"""

from torch import fx, nn

from headrace.extract.backbones.nodes import LOGITS, PRE_LOGITS, Node
from headrace.pipelines.models.errors import CannotSplit


class _Tracer(fx.Tracer):
    """Enters the modules around the node; calls every other module as a whole."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self.around = {"", *_ancestors(node)}

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.around


def part_above(module: nn.Module, node: Node) -> fx.GraphModule:
    """The part of `module` that goes from the node's output to the network's, on the network's own
    submodules.

    Raises CannotSplit for a node whose output is not all that the part above is made of, for
    layouts that a map does not hold whole, and for code that cannot be traced.
    """
    if node.name in (LOGITS, PRE_LOGITS) or node.layout != "NCHW":
        raise CannotSplit(
            f"{node.name} has outputs of layout {node.layout}, and a split needs channels and "
            "positions (NCHW) that a map holds whole: split at a convolutional block, or train "
            "from the images (leave the map out)"
        )
    tracer = _Tracer(node.name)
    try:
        graph = tracer.trace(module)
    except Exception as error:  # noqa: BLE001 (whatever a network's own code does with values that are not there)
        raise CannotSplit(
            f"the network's code around {node.name} cannot be traced ({type(error).__name__}: "
            f"{str(error)[:200]}): train from the images (leave the map out)"
        ) from None
    calls = [
        item for item in graph.nodes if item.op == "call_module" and item.target == node.module
    ]
    if len(calls) != 1:
        raise CannotSplit(
            f"{node.name} is called {len(calls)} times in the network's forward, expected once: "
            "split elsewhere"
        )
    (call,) = calls
    with graph.inserting_before(call):
        start = graph.create_node("placeholder", "cut_map")
    call.replace_all_uses_with(start)
    graph.erase_node(call)
    for item in reversed(list(graph.nodes)):  # by hand: fx keeps what could have side effects
        if not item.users and item.op not in ("output", "placeholder"):
            graph.erase_node(item)
    for item in [item for item in graph.nodes if item.op == "placeholder" and item is not start]:
        if item.users:
            raise CannotSplit(
                f"what lies above {node.name} also reads what lies below it ({_reader(item)}): "
                "split where the whole network passes through one output, such as the end of a "
                "stage"
            )
        graph.erase_node(item)
    part = fx.GraphModule(_Shell(module), graph)
    part.graph.lint()
    return part


class _Shell(nn.Module):
    """The network's children under their names, without its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _reader(item: fx.Node) -> str:
    return str(next(iter(item.users)))
