"""Names in checkpoints: which tensors of a file are the network's, under whatever prefix."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from headrace.extract.errors import BackboneError

# torch.compile, FSDP and activation checkpointing insert these anywhere in a name.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# blocks.CHUNK.BLOCK, see `without_chunks`.
_CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")
# A prefix under which nearly as many tensors fit as under the best one is another copy of the
# network, such as DINO's teacher and student.
_RIVAL_SHARE = 0.9
# Words in the names of heads and of other parts that a network has only while it is trained.
_HEAD_WORDS = {
    *("head", "heads", "fc", "classifier", "proj", "projector", "projection", "predictor"),
    *("decoder", "mask", "logit", "logits", "loss", "criterion", "queue", "prototypes"),
    *("aux", "auxlogits", "text", "linear"),
}


def network_prefix(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], network_description: str
) -> str:
    """Return the prefix of the network's names in a file, such as "module.backbone.".

    expected: the network's state dict, with which names and shapes are compared. "" if the names
    have no prefix, or if no tensor fits. Of a student and its teacher the teacher is taken, which
    DINO evaluates; copies with equal values count as one.

    Raises BackboneError if several other copies fit.
    """
    # {prefix: how many tensors fit without it}. Prefixes are the beginnings of names up to a dot.
    counts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        start = 0
        while True:
            suffix = name[start:]
            if suffix in expected and expected[suffix].shape == tensor.shape:
                counts[name[:start]] += 1
            if (dot := name.find(".", start)) < 0:
                break
            start = dot + 1
    if not counts:
        return ""
    best_count = max(counts.values())
    rivals = sorted(
        (prefix for prefix, count in counts.items() if count >= _RIVAL_SHARE * best_count),
        key=lambda prefix: (len(prefix), prefix),
    )
    # Where less than half fits, these are no copies: layers of one shape fit in others' places.
    is_most = 2 * best_count >= len(expected)
    if len(rivals) == 1 or not is_most or _are_copies(tensors, expected, rivals):
        return rivals[0]
    teachers = [prefix for prefix in rivals if "teacher" in prefix.split(".")]
    students = [prefix for prefix in rivals if "student" in prefix.split(".")]
    if len(teachers) == 1 and len(teachers) + len(students) == len(rivals):
        return teachers[0]
    quoted = ", ".join(repr(prefix) for prefix in rivals)
    raise BackboneError(
        f"{network_description}: the file holds {len(rivals)} copies of the network that differ, "
        f"under the prefixes {quoted}. Say which one: weights_prefix: {rivals[-1]!r} in the "
        f"recipe's backbone, or BackboneSpec(..., weights_prefix={rivals[-1]!r})"
    )


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the parts of names that wrappers of a network insert.

    The wrappers are torch.compile, FSDP, activation checkpointing and DistributedDataParallel.
    """
    names = list(tensors)
    for inserted in _INSERTED:
        names = [name.replace(inserted, "") for name in names]
    if all(name.startswith("module.") for name in names):  # of DistributedDataParallel
        names = [name.removeprefix("module.") for name in names]
    renamed = dict(zip(names, tensors.values(), strict=True))
    # If two names became one, the names stay.
    kept = renamed if len(renamed) == len(tensors) else dict(tensors)
    # In the mapping's own type: OrderedDict, or UnorderedTensors, of which the order is not used.
    return type(tensors)(kept) if isinstance(tensors, dict) else kept


def without_chunks(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors with chunks of blocks removed from their names, if the network has none.

    DINOv2 is trained with blocks.2.7 as its eighth block, which timm calls blocks.7.
    """
    chunked = any(_CHUNK.search(name) for name in tensors)
    if not chunked or any(_CHUNK.search(name) for name in expected):
        return dict(tensors)
    renamed = {_CHUNK.sub(r"\1blocks.\2.", name): tensor for name, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def with_child_names(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], children: Sequence[str]
) -> dict[str, Tensor]:
    """Return the tensors with the names of the network's children in place of numbers, if the file
    has the network as nn.Sequential(*network.children()), under any prefix.

    children: names of the network's children that have tensors, in their order.
    """
    # {prefix: numbers of the children after it}. Only their order counts: children without tensors
    # leave gaps.
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        for match in re.finditer(r"(?:^|(?<=\.))(\d{1,4})\.", name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    for prefix in sorted(numbers, key=len):
        child_of_number = dict(zip(sorted(numbers[prefix]), children, strict=False))
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            child_match = re.match(rf"{re.escape(prefix)}(\d{{1,4}})\.", name)
            if child_match and (child := child_of_number.get(int(child_match[1]))):
                renamed[f"{prefix}{child}.{name[child_match.end() :]}"] = tensor
            else:
                renamed[name] = tensor
        n_fitting = sum(
            prefix + name in renamed and renamed[prefix + name].shape == tensor.shape
            for name, tensor in expected.items()
        )
        if 2 * n_fitting > len(expected):
            return renamed
    return dict(tensors)


def owner_module(name: str, module_names: Collection[str]) -> str:
    """Return the name of the innermost module that holds a tensor; "" is the network itself."""
    owner = name.rpartition(".")[0]
    while owner and owner not in module_names:
        owner = owner.rpartition(".")[0]
    return owner


def is_head_name(name: str) -> bool:
    """Return whether the first part of a tensor's name has a word for a head, or for training."""
    first_part = name.partition(".")[0].lower()
    return not _HEAD_WORDS.isdisjoint(word.rstrip("0123456789") for word in first_part.split("_"))


def _are_copies(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefixes: Sequence[str]
) -> bool:
    """Return whether the network's tensors are the same under each prefix."""
    first, *others = prefixes
    names = [name for name in expected if first + name in tensors]
    return all(
        other + name in tensors and torch.equal(tensors[first + name], tensors[other + name])
        for other in others
        for name in names
    )
