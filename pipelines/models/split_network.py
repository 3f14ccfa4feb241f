"""Splitting of a network at a node: the part above it, with the network's own parameters.

The part is found by tracing the network's forward with torch.fx.
"""

from torch import fx, nn

from headrace.extract.backbones.nodes import LOGITS, PRE_LOGITS, Node
from headrace.pipelines.models.errors import CannotSplit


class _Tracer(fx.Tracer):
    """Enters the modules around the node; calls every other module as a whole."""

    def __init__(self, node: str) -> None:
        super().__init__()
        parts = node.split(".")
        self.around = {".".join(parts[:length]) for length in range(len(parts))}

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        # Code elsewhere in the network that cannot be traced does no harm.
        return module_qualified_name not in self.around


def part_above(module: nn.Module, node: Node) -> fx.GraphModule:
    """Return the part of `module` from the node's output to the network's output, made of the
    network's own submodules.

    Raises CannotSplit if the part also reads something below the node, if the node's output is not
    a feature map, or if the code around the node cannot be traced.
    """
    if node.name in (LOGITS, PRE_LOGITS) or node.layout != "NCHW":
        raise CannotSplit(
            f"{node.name} has outputs of layout {node.layout}, and a split needs channels and "
            "positions (NCHW) that a map holds whole: split at a convolutional block, or train "
            "from the images"
        )
    tracer = _Tracer(node.name)
    try:
        graph = tracer.trace(module)
    except Exception as error:  # noqa: BLE001 (whatever a network's own code does with values that are not there)
        raise CannotSplit(
            f"the network's code around {node.name} cannot be traced ({type(error).__name__}: "
            f"{str(error)[:200]}): train from the images"
        ) from None
    node_calls = [
        graph_node
        for graph_node in graph.nodes
        if graph_node.op == "call_module" and graph_node.target == node.module
    ]
    if len(node_calls) != 1:
        raise CannotSplit(
            f"{node.name} is called {len(node_calls)} times in the network's forward, expected "
            "once: split elsewhere"
        )
    (node_call,) = node_calls
    with graph.inserting_before(node_call):
        split_input = graph.create_node("placeholder", "split_map")
    node_call.replace_all_uses_with(split_input)
    graph.erase_node(node_call)
    # fx's own elimination of dead code keeps calls that could have side effects.
    for graph_node in reversed(list(graph.nodes)):
        if not graph_node.users and graph_node.op not in ("output", "placeholder"):
            graph.erase_node(graph_node)
    for graph_node in list(graph.nodes):
        if graph_node.op != "placeholder" or graph_node is split_input:
            continue
        if graph_node.users:
            raise CannotSplit(
                f"what lies above {node.name} also reads what lies below it "
                f"({next(iter(graph_node.users))}): split where the whole network passes through "
                "one output, such as the end of a stage"
            )
        graph.erase_node(graph_node)
    # It shares the network's modules: training the part trains the network.
    module_above = fx.GraphModule(_Shell(module), graph)
    module_above.graph.lint()
    return module_above


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
