"""ONNX files as backbones: `onnx:FILE`, run by onnxruntime, with its inner values as taps."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing

_OUTPUT_SUFFIXES = ("_output_0", ":0")  # of the names of values, in exports of PyTorch and Keras


class OnnxNetwork(nn.Module):
    """An ONNX graph as a module with one submodule per inner value, which returns that value.

    Hooks on the submodules see the values, as they see the layers of any network. A forward pass
    computes only the part of the graph on which the values with hooks depend.

    Raises BackboneError for a graph without an image as its only input, or without inner values.
    """

    def __init__(self, file: Path) -> None:
        import onnx

        super().__init__()
        # Loads weights from files beside it too; onnx refuses those outside the file's folder.
        model = onnx.load(str(file))
        content = model.SerializeToString(deterministic=True)
        self._graph = onnx.shape_inference.infer_shapes(model)
        # A buffer, because `weights_digest` covers the buffers: so it covers the whole file.
        content_digest = bytearray(hashlib.sha256(content).digest())
        self.register_buffer("digest", torch.frombuffer(content_digest, dtype=torch.uint8))
        self.input_name, self.input_shape, self.channels_last = _image_input(self._graph, file)
        self._value_of: dict[str, str] = {}  # {module path: name of the value in the graph}
        self._sessions: dict[tuple[str, ...], Any] = {}
        for value in _inner_values(self._graph):
            path = _module_path(value, taken=self._value_of)
            self._value_of[path] = value
            _add_leaf(self, path)
        if not self._value_of:
            raise BackboneError(f"onnx:{file} computes no value of 2 to 4 axes: nothing to tap")
        self.output_module = next(reversed(self._value_of))  # whose value the network returns

    def forward(self, pixels: Tensor) -> Tensor:
        """Run the graph on (N, 3, H, W) float32; return its last value.

        Raises BackboneError where gradients are asked for.
        """
        if torch.is_grad_enabled():  # a training pass; those of frozen networks disable gradients
            raise BackboneError(
                "an onnx: backbone has no gradients: take its features, and fine-tune a network of "
                "timm, torchvision or transformers"
            )
        leaves = {path: self.get_submodule(path) for path in self._value_of}
        hooked_paths = [path for path, leaf in leaves.items() if leaf._forward_hooks]
        # If the network's output has a hook too, the graph runs once; otherwise the hooked values
        # come first, because TapCapture ends the pass when it has them all.
        passes = (
            [hooked_paths]
            if self.output_module in hooked_paths
            else [hooked_paths, [self.output_module]]
        )
        for paths in filter(None, passes):
            values = self._run([self._value_of[path] for path in paths], pixels)
            for path, value in zip(paths, values, strict=True):
                output = leaves[path](value)
        return torch.as_tensor(output)

    def require_size(self, size: int, name: str) -> None:
        """Raise BackboneError if the graph takes only images of another size."""
        fixed_edges = [edge for edge in self.input_shape[1:] if edge not in (None, size)]
        if fixed_edges:
            raise BackboneError(
                f"{name}: image_size is {size}, and the file takes images of {fixed_edges[0]} "
                "pixels only: leave image_size out, or export it with dynamic height and width"
            )

    def _run(self, names: Sequence[str], pixels: Tensor) -> list[Tensor]:
        session = self._session(tuple(names))
        images = pixels.detach().to("cpu", torch.float32)
        images = images.permute(0, 2, 3, 1) if self.channels_last else images
        array = np.ascontiguousarray(images.numpy())
        batch_size = self.input_shape[0]  # many exports take one image, or another fixed number
        batches = [array] if batch_size is None else _padded_batches(array, batch_size)
        if session.get_inputs()[0].type == "tensor(float16)":
            batches = [batch.astype(np.float16) for batch in batches]
        try:
            batch_outputs = [
                session.run(list(names), {self.input_name: batch}) for batch in batches
            ]
        except Exception as error:  # onnxruntime's own errors have no common class
            raise RuntimeError(f"onnxruntime: {' '.join(str(error).split())}") from error
        # Batch by batch to value by value, without the padding of the last batch.
        outputs = (
            np.concatenate(value)[: len(array)] for value in zip(*batch_outputs, strict=True)
        )
        return [torch.from_numpy(output).to(pixels.device) for output in outputs]

    def _session(self, names: tuple[str, ...]) -> Any:
        """Return the session for the part of the graph on which these values depend."""
        import onnxruntime

        # Part of the key, because a session keeps the number of threads with which it was made.
        threads = torch.get_num_threads()
        if (*names, str(threads)) not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3  # errors; its warnings are of unused initializers
            subgraph = _subgraph_up_to(self._graph, names)
            self._sessions[*names, str(threads)] = onnxruntime.InferenceSession(
                subgraph.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[*names, str(threads)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxNetwork":
        # Sessions cannot be copied, and the graph is never changed: a copy shares it.
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        shared = {"_graph": self._graph, "_sessions": {}}
        copied = {name: value for name, value in self.__dict__.items() if name not in shared}
        duplicate.__dict__.update(copy.deepcopy(copied, memo), **shared)
        return duplicate


class _Value(nn.Module):
    """One inner value of the graph, returned as it is."""

    def forward(self, value: Tensor) -> Tensor:
        return value


def build_onnx(file: Path) -> tuple[nn.Module, Preprocessing]:
    """Load an ONNX file as a network.

    Raises BackboneError if onnx or onnxruntime is not installed, the file is not ONNX, or its only
    input is no image.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise BackboneError(
            f"onnx:{file} needs onnx and onnxruntime. Try: pip install 'headrace[onnx]'"
        ) from error
    if not file.is_file():
        raise BackboneError(f"onnx:{file}: no such file")
    try:
        module = OnnxNetwork(file)
    except BackboneError:
        raise
    except Exception as error:  # protobuf's own errors have no common class
        raise BackboneError(f"onnx:{file} cannot be read as ONNX: {str(error)[:200]}") from error
    height, width = module.input_shape[1:]
    size = (height or 224, width or 224)
    # The file says nothing about preprocessing but its input's size: mean and std are ImageNet's
    # unless the recipe gives others, and of a square crop only the longer edge is cut off.
    return module, Preprocessing(
        resize=size,
        crop=size,
        mode="shortest" if size[0] == size[1] else "squash",
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )


def _image_input(
    graph: Any, file: Path
) -> tuple[str, tuple[int | None, int | None, int | None], bool]:
    """Return (name, (batch, height, width), whether channels are last) of a graph's image input.

    Sizes are None if the graph leaves them open.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in weights]
    shapes = [_shape(value) for value in inputs]
    for value, shape in zip(inputs, shapes, strict=True):
        if len(inputs) == 1 and len(shape) == 4 and 3 in (shape[1], shape[3]):
            is_channels_last = shape[1] != 3
            height, width = shape[1:3] if is_channels_last else shape[2:]
            return value.name, (shape[0], height, width), is_channels_last
    inputs_text = ", ".join(f"{v.name} {s}" for v, s in zip(inputs, shapes, strict=True))
    raise BackboneError(
        f"onnx:{file} takes {inputs_text or 'nothing'}: expected one input of shape (N, 3, H, W) "
        "or (N, H, W, 3)"
    )


def _shape(value: Any) -> tuple[int | None, ...]:
    """Return the sizes of a value, None for one that the graph leaves open."""
    sizes = value.type.tensor_type.shape.dim
    return tuple(
        size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else None
        for size in sizes
    )


def _inner_values(graph: Any) -> Iterator[str]:
    """Yield the names of the float values with 2 to 4 axes that a graph computes, in order."""
    value_of_name = {value.name: value for value in (*graph.graph.value_info, *graph.graph.output)}
    float_types = (1, 10)  # onnx.TensorProto.FLOAT, FLOAT16
    for node in graph.graph.node:
        for name in node.output[:1]:
            value = value_of_name.get(name)
            if node.op_type == "Constant" or value is None:
                continue
            tensor = value.type.tensor_type
            if tensor.elem_type in float_types and 2 <= len(tensor.shape.dim) <= 4:
                yield name


def _module_path(value: str, taken: dict[str, str]) -> str:
    """Return a dotted module path for a value: "layer1.layer1.0.relu.Relu" for
    "/layer1/layer1.0/relu/Relu_output_0", or "value_N" if that path cannot be used.
    """
    name = value
    for suffix in _OUTPUT_SUFFIXES:
        name = name.removesuffix(suffix)
    path = ".".join(word for word in name.replace("/", ".").split(".") if word)
    # A module must not have the name of an attribute of nn.Module, nor lie inside another value's.
    is_reserved = any(hasattr(nn.Module, word) or word == "digest" for word in path.split("."))
    if not path or is_reserved:
        path = f"value_{len(taken)}"
    is_nested = any(
        path.startswith(f"{taken_path}.") or taken_path.startswith(f"{path}.")
        for taken_path in taken
    )
    return f"value_{len(taken)}" if is_nested or path in taken else path


def _add_leaf(root: nn.Module, path: str) -> None:
    *parents, leaf = path.split(".")
    module = root
    for name in parents:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module._modules[name]  # type: ignore[assignment]
    module.add_module(leaf, _Value())


def _subgraph_up_to(graph: Any, names: Sequence[str]) -> Any:
    """Return the part of a graph on which the named values depend, with them as its outputs."""
    import onnx

    producer = {output: node for node in graph.graph.node for output in node.output}
    needed: set[int] = set()
    pending_names = list(names)
    while pending_names:
        node = producer.get(pending_names.pop())
        if node is None or id(node) in needed:
            continue
        needed.add(id(node))
        pending_names += [name for name in node.input if name]
        # The bodies of If and Loop read values of the graph around them.
        inner_nodes = (inner for attribute in node.attribute for inner in attribute.g.node)
        pending_names += [name for inner in inner_nodes for name in inner.input]
    nodes = [node for node in graph.graph.node if id(node) in needed]
    names_read = {name for node in nodes for name in node.input}
    value_of_name = {value.name: value for value in (*graph.graph.value_info, *graph.graph.output)}
    subgraph = onnx.helper.make_graph(
        nodes,
        graph.graph.name or "part",
        list(graph.graph.input),
        [value_of_name[name] for name in names],
        [tensor for tensor in graph.graph.initializer if tensor.name in names_read],
    )
    model = onnx.helper.make_model(
        subgraph, opset_imports=graph.opset_import, functions=graph.functions
    )
    model.ir_version = graph.ir_version
    return model


def _padded_batches(images: np.ndarray[Any, Any], size: int) -> list[np.ndarray[Any, Any]]:
    """Return batches of exactly `size` images, the last one filled up with zeros."""
    padding = np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)
    return list(np.split(np.concatenate([images, padding]), (len(images) + len(padding)) // size))
