"""A file that somebody sends chooses no code: models name networks and estimators, and nothing is
imported unasked.
"""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load, save
from support.models import client_here, run_here
from support.runs import make_photos
from typer.testing import CliRunner

from headrace.cache.errors import SpecMismatch
from headrace.cache.format.sealed import tensor_metadata
from headrace.cache.spec import FeatureSpec
from headrace.extract.backbones.backbone import override_preprocessing
from headrace.extract.errors import BackboneError
from headrace.extract.images.preprocessing import Preprocessing
from headrace.extract.images.views import Augmentation, parse_view
from headrace.extract.spec import BackboneSpec, backbone_from_fields
from headrace.heads.errors import HeadError
from headrace.heads.linear.kind import LogisticSpec, RidgeSpec
from headrace.heads.persist import CodeNotTrusted, load_head
from headrace.heads.sklearn.bank import estimator_code, fitted_sklearn, make_estimator
from headrace.heads.sklearn.kind import SklearnSpec
from headrace.heads.spec import spec_to_json
from headrace.pipelines.cli.main import app
from headrace.pipelines.models.errors import ModelError
from headrace.pipelines.models.model import load_model, trusted_code
from headrace.pipelines.recipe.finetune_spec import FineTuneSpec

SENT = """\
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from sklearn.base import BaseEstimator, ClassifierMixin

def network():
    raise SystemExit("called")

class Classifier(ClassifierMixin, BaseEstimator):
    pass
"""
WORKING = """\
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
import torch
from sklearn.neighbors import KNeighborsClassifier
from headrace import Preprocessing

def network():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3))
    return layers, Preprocessing((32, 32), (32, 32), "shortest", "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

class Classifier(KNeighborsClassifier):
    pass
"""


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """The file that appears when the module `sent_module`, which can be imported, is."""
    (tmp_path / "sent_module.py").write_text(SENT)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    sys.modules.pop("sent_module", None)


def model(place, *, backbone="timm:test_resnet", spec=None, weights="random:0", arguments=None):
    """A model directory as somebody could write it by hand."""
    spec = spec or RidgeSpec(1.0)
    feature = FeatureSpec(
        backbone, "w" * 64, "fc", "avg", "{}", '{"index": 0}', "pillow", "float32", "float16", (4,)
    )
    about = {
        "format": 1,
        "spec": json.loads(spec_to_json(spec)),
        "task_kind": "single",
        "classes": ["a", "b"],
        "features": [json.loads(feature.to_json())],
        "backbones": [{"name": backbone, "weights": weights, "model": arguments}],
        "metrics": {},
    }
    arrays = {"weight": np.zeros((1, 4), np.float32), "bias": np.zeros(1, np.float32)}
    if isinstance(spec, SklearnSpec):
        arrays = {
            "features": np.eye(4, dtype=np.float32),
            "target": np.array([0, 1, 0, 1]),
            "sample_weight": np.ones(4),
            "outputs": np.array([2]),
        }
    place.mkdir(parents=True, exist_ok=True)
    (place / "head.safetensors").write_bytes(save(arrays, metadata={"headrace": json.dumps(about)}))
    (place / "head.json").write_text("{}")
    return place


def ensemble(place, *members, names=None):
    about = {
        "format": 2,
        "kind": "ensemble",
        "members": [
            {"model": name, "weight": 1 / len(members), "temperature": 1.0}
            for name in names or [str(each.relative_to(place)) for each in members]
        ],
        "temperature": 1.0,
        "task_kind": "single",
        "classes": ["a", "b"],
        "metrics": {},
    }
    (place / "ensemble.json").write_text(json.dumps(about))
    return place


OWN = SklearnSpec("sent_module.Classifier", "{}")


@pytest.mark.parametrize(
    ("asks", "code"),
    [
        ({"backbone": "python:sent_module:network"}, "sent_module:network"),
        ({"spec": OWN}, "sent_module:Classifier"),
    ],
)
def test_code_is_asked_for_and_not_imported(tmp_path, flag, asks, code):
    """A network of its own, an estimator by import path: the message names the code and the option,
    and nothing is imported.
    """
    place = model(tmp_path / "model", **asks)
    with pytest.raises(CodeNotTrusted, match=f"--trust-code {code}"):
        load_model(place)
    with pytest.raises(CodeNotTrusted, match="imported and called"):
        load_model(place, trust_code=["sent_module:another"])
    (tmp_path / "model" / "members").mkdir()
    shutil.copytree(place, tmp_path / "pair" / "members" / "0")
    with pytest.raises(CodeNotTrusted, match=code):
        load_model(ensemble(tmp_path / "pair", tmp_path / "pair" / "members" / "0"))
    assert not flag.exists()
    assert load_model(place, trust_code=[code]).trust_code == (code,)
    assert load_model(place, trust_code=[code.replace(":", ".")]).trust_code == (code,)


def test_arguments_of_a_trusted_function_are_allowed_with_it(tmp_path, flag):
    """They may be a path or an address: the sender does not choose them."""
    place = model(
        tmp_path / "model",
        backbone="python:sent_module:network",
        arguments={"checkpoint": "http://a/b.pth"},
    )
    with pytest.raises(CodeNotTrusted, match="asks for code") as refused:
        load_model(place, trust_code=["sent_module:network"])
    (option,) = shlex.split(
        str(refused.value).partition("type: --trust-code ")[2].partition(" (in")[0]
    )
    assert load_model(place, trust_code=[option]).trust_code == (option,)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "images: {folder: .}\nheads: {ridge: {alpha: [1]}}\nbackbones:\n- name: python:sent_module:network\n"
        "  model: {checkpoint: 'http://a/b.pth'}\n  taps: [fc.avg]\n"
    )
    assert trusted_code(recipe) == {option}  # the user's own words
    assert not flag.exists()


def test_a_head_alone_asks_in_the_same_words(tmp_path, flag):
    """`load_head`, the level below: an estimator that is not scikit-learn's own is loaded where it
    is named, and fitted then.
    """
    place = model(tmp_path / "model", spec=OWN)
    said = []
    for read in (load_head, load_model):
        with pytest.raises(CodeNotTrusted, match="--trust-code sent_module:Classifier") as refused:
            read(place)
        said.append(str(refused.value))
    assert said[0] == said[1]
    with pytest.raises(CodeNotTrusted):
        load_head(place, trust_code=["sent_module:network"])
    head = load_head(place, trust_code=["sent_module.Classifier"])
    assert not flag.exists()
    with pytest.raises(HeadError):  # it is a class without `fit`
        head.predict(np.eye(4))
    assert flag.exists()
    plain = load_head(
        model(tmp_path / "plain", spec=SklearnSpec("sklearn.naive_bayes.GaussianNB", "{}"))
    )
    assert plain.predict(np.eye(4)).tolist() == ["a", "b", "a", "b"]


@pytest.mark.parametrize("command", ["predict", "export"])
def test_commands_pass_on_what_the_user_allows(tmp_path, flag, command, monkeypatch):
    """Without the option nothing is imported; with it, that name alone."""
    monkeypatch.chdir(tmp_path)
    place = model(tmp_path / "model", backbone="python:sent_module:network")
    (tmp_path / "photos").mkdir()
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    rest = ["photos", "-o", "p.csv"] if command == "predict" else ["out"]
    refused = CliRunner().invoke(app, [command, str(place), *rest])
    assert isinstance(refused.exception, CodeNotTrusted), refused.output
    assert not flag.exists()
    CliRunner().invoke(app, [command, str(place), *rest, "--trust-code", "sent_module:network"])
    assert flag.exists()


@pytest.fixture(scope="module")
def sent_run(tmp_path_factory):
    """A finished run on a network and with an estimator of the module `sent_module`; its recipe,
    and the module's folder.
    """
    folder = tmp_path_factory.mktemp("sent")
    make_photos(folder / "photos", n=48)
    (folder / "sent_module.py").write_text(WORKING)
    (folder / "recipe.yaml").write_text(
        "images: {folder: photos}\ntask: {folds: 3}\n"
        'backbones: [{name: "python:sent_module:network", taps: [1.avg, 2.avg]}]\n'
        "heads: {sklearn: [{estimator: sent_module.Classifier}]}\ncompute: {workers: 1, "
        "images_per_shard: 64}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        run_here(folder / "recipe.yaml")
    sys.modules.pop("sent_module")
    return folder


@pytest.fixture
def unimported(sent_run, monkeypatch):
    """The folder of `sent_run`, whose module can be imported, and has not been since."""
    monkeypatch.syspath_prepend(sent_run)
    (sent_run / "imported").unlink(missing_ok=True)
    yield sent_run
    sys.modules.pop("sent_module", None)


@pytest.mark.slow
def test_no_command_on_a_runs_directory_imports_what_the_run_names(
    unimported, tmp_path, monkeypatch
):
    """`status`, `advise` and `report` come to their end; the page says what it lacks, and what to
    type.
    """
    monkeypatch.setattr("headrace.pipelines.advice.advise_run.local_client", client_here)
    run, page = str(unimported / "headrace-runs" / "recipe"), tmp_path / "page.html"
    for arguments in (
        ["status", run],
        ["advise", run],
        ["report", run, "--out", str(page), "--tables"],
    ):
        said = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert said.exit_code == 0, said.output
        assert not (unimported / "imported").exists(), arguments
    assert "type: --trust-code sent_module:Classifier" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("allowed", ["by the option", "by the recipe"])
def test_a_report_predicts_again_what_it_may(unimported, tmp_path, allowed):
    """With the name on the command line, or by the recipe that names it, the page is whole."""
    given = (
        ["headrace-runs/recipe", "--trust-code", "sent_module.Classifier"]
        if allowed == "by the option"
        else ["recipe.yaml"]
    )
    page = tmp_path / "page.html"
    said = CliRunner().invoke(
        app,
        ["report", str(unimported / given[0]), *given[1:], "--out", str(page)],
        catch_exceptions=False,
    )
    assert said.exit_code == 0
    assert (unimported / "imported").exists()
    assert "would be imported" not in page.read_text()


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A fine-tuned network on a backbone of `sent_module`, which was imported to make it, and is
    not any more.
    """
    from headrace.extract.backbones.backbone import load_backbone
    from headrace.extract.taps.resolve import parse_tap
    from headrace.pipelines.models.network import save_network
    from headrace.pipelines.models.torch_head import head_module
    from headrace.pipelines.models.torch_network import Network

    (tmp_path / "sent_module.py").write_text(WORKING)
    monkeypatch.syspath_prepend(tmp_path)
    backbone = load_backbone(BackboneSpec("python:sent_module:network", weights="random:0"))
    arrays = {"weight": np.eye(2, 8, dtype=np.float32), "bias": np.zeros(2, np.float32)}
    head = head_module(LogisticSpec(1.0), arrays, "single")
    made = Network(backbone, [parse_tap("2.avg")], head).eval()
    spec = FineTuneSpec(head=spec_to_json(LogisticSpec(1.0)), train_above="all")
    save_network(
        tmp_path / "net",
        made,
        backbone,
        spec=spec,
        task_kind="single",
        classes=("a", "b"),
        metrics={},
        temperature=1.0,
    )
    sys.modules.pop("sent_module", None)  # a process builds a network once
    (tmp_path / "imported").unlink(missing_ok=True)
    yield tmp_path / "net"
    sys.modules.pop("sent_module", None)


def test_a_fine_tuned_network_asks_at_both_levels(network):
    """`load_model` and `load_network`: nothing is imported before the name is there, and then it
    predicts.
    """
    from headrace.pipelines.models.network import load_network

    for read in (load_model, load_network):
        with pytest.raises(CodeNotTrusted, match="--trust-code sent_module:network"):
            read(network)
    assert not (network.parent / "imported").exists()
    found = load_model(network, trust_code=["sent_module:network"])
    assert not (network.parent / "imported").exists()
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    expected = load_network(network, trust_code=["sent_module.network"]).predict_proba(pixels)
    np.testing.assert_allclose(found.predict_proba(pixels), expected, atol=1e-6)


def test_the_network_that_was_checked_is_the_one_that_runs(network):
    """A file that is put in its place between the two is refused, even one that is whole."""
    found = load_model(network, trust_code=["sent_module:network"])
    data = (network / "network.safetensors").read_bytes()
    about = json.loads(tensor_metadata(data)["headrace"])
    about["backbone"]["name"] = "python:os:getcwd"
    (network / "network.safetensors").write_bytes(
        save(load(data), metadata={"headrace": json.dumps(about)})
    )
    with pytest.raises(ModelError, match="has been replaced"):
        found.predict_proba(np.zeros((1, 32, 32, 3), np.uint8))
    assert not (network.parent / "imported").exists()
    (network / "network.safetensors").write_bytes(data)
    assert found.predict_proba(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 2)


def test_a_recipe_is_the_users_own_words(tmp_path):
    """The run of a recipe may use what the recipe names; the same run given by its directory has to
    be asked for.
    """
    (tmp_path / "recipe.yaml").write_text(
        "images: {folder: photos}\n"
        'backbones: [{name: "python:sent_module:network", taps: [fc.avg]}]\n'
        "heads: {sklearn: [{estimator: sent_module.Classifier}]}\n"
    )
    run = tmp_path / "headrace-runs" / "recipe"
    model(run / "winner", backbone="python:sent_module:network", spec=OWN)
    (run / "recipe.json").write_text("{}")
    assert set(load_model(tmp_path / "recipe.yaml").trust_code) == {
        "sent_module:network",
        "sent_module:Classifier",
    }
    with pytest.raises(CodeNotTrusted):
        load_model(run)
    model(run / "winner", backbone="python:sent_module:another")
    with pytest.raises(CodeNotTrusted, match="sent_module:another"):
        load_model(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": 5}, "says name: 5"),
        ({"weights": ["a"]}, "says weights"),
        ({"image_size": 2**31}, "says image_size"),
        ({"image_size": 2**15}, "more than the limit"),
        ({"mean": [0.5]}, "mean has 1 values, and std 3"),
        ({"std": ["x", 1, 1]}, "says std"),
        ({"interpolation": "odd"}, "says interpolation"),
        ({"unknown": 1}, "does not know: unknown"),
    ],
)
def test_a_network_that_cannot_be_is_told(changed, said):
    """Of a model's file: values of a wrong kind, and sizes that no image has, end in a sentence and
    take no memory.
    """
    with pytest.raises(BackboneError, match=said):
        override_preprocessing(
            Preprocessing(
                (32, 32), (32, 32), "shortest", "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            ),
            backbone_from_fields({"name": "timm:test_resnet", **changed}),
        )


HUGE = "timm:vit_huge_patch14_224"  # 630 million parameters


def test_a_model_builds_no_network_larger_than_its_weights(tmp_path):
    """That it names the largest network of a library costs neither its memory nor its time."""
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "small.safetensors").write_bytes(save({"a": np.zeros(8, np.float32)}))
    sent = load_model(model(tmp_path / "sent", backbone=HUGE, weights="small.safetensors"))
    with pytest.raises(
        BackboneError,
        match=rf"{HUGE}: the network has more than .* its weights file holds 8 numbers",
    ):
        sent.predict_proba(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_fine_tuned_network_is_not_built_larger_than_its_file(network):
    """Whatever name a file that was sent gives to its network."""
    from headrace.pipelines.models.network import load_network

    path = network / "network.safetensors"
    data = path.read_bytes()
    about = json.loads(tensor_metadata(data)["headrace"])
    about["backbone"]["name"] = HUGE
    path.write_bytes(save(load(data), metadata={"headrace": json.dumps(about)}))
    with pytest.raises(BackboneError, match=f"{HUGE}: the network has more than"):
        load_network(network)


def test_a_view_that_cannot_be_is_told():
    """A model's file says which view each of its features is of."""
    assert parse_view('{"index": 0}') == (0, Augmentation())
    for text in (
        "",
        "[]",
        "{}",
        '{"index": -1}',
        '{"index": "1"}',
        '{"index": 1, "augmentation": {"area": ["x"]}}',
        "9" * 5000,
    ):
        with pytest.raises(SpecMismatch, match="none that this version makes"):
            parse_view(text)


SAFE = [
    ("sklearn.svm.SVC", {"kernel": "rbf", "C": 2.0}),
    ("sklearn.ensemble.RandomForestClassifier", {"n_estimators": 5}),
    ("sklearn.linear_model.Lasso", {}),
    ("sklearn.naive_bayes.GaussianNB", {}),
    ("sklearn.neighbors.KNeighborsClassifier", {"metric": "cosine"}),
    ("sklearn.ensemble.AdaBoostClassifier", {}),
]
ASKS = [
    ("sklearn.ensemble.BaggingClassifier", {"estimator": "sent_module.Classifier"}),
    ("sklearn.ensemble.VotingClassifier", {"estimators": [["a", "b"]]}),
    ("sklearn.ensemble.StackingClassifier", {"final_estimator": "x"}),
    (
        "sklearn.neighbors.KNeighborsClassifier",
        {"metric": "pyfunc", "metric_params": {"func": "os.system"}},
    ),
    ("sklearn.ensemble.RandomForestClassifier", {"n_jobs": 100_000}),
    ("sklearn.preprocessing.FunctionTransformer", {"func": "os.system"}),
    ("sklearn.pipeline.Pipeline", {"steps": [], "memory": "/tmp"}),
    ("sklearn.compose.TransformedTargetRegressor", {"func": "os.system"}),
    ("sklearn.ensemble.IsolationForest", {}),
    ("sklearn.svm._classes.SVC", {}),
    ("sklearn.svm.no_such", {}),
    ("sklearn.linear_model.np", {}),
    ("sklearn.tests.test_base.MyEstimator", {}),
    ("sklearnx.svm.SVC", {}),
    ("os.system", {}),
    ("os", {}),
]


@pytest.mark.parametrize(("name", "parameters"), SAFE)
def test_plain_estimators_of_scikit_learn_need_no_asking(name, parameters):
    """Its classifiers and regressors with values for parameters: only scikit-learn's own code can
    come of them.
    """
    spec = SklearnSpec(name, json.dumps(parameters))
    assert estimator_code(spec) is None
    make_estimator(spec)


@pytest.mark.parametrize(("name", "parameters"), ASKS)
def test_estimators_that_can_hold_other_code_ask(name, parameters):
    """Nested estimators, functions, files of pickles, thousands of processes, private modules, all
    other packages.
    """
    assert estimator_code(SklearnSpec(name, json.dumps(parameters))) is not None


def test_a_weights_file_outside_of_the_model_is_asked_for(tmp_path, monkeypatch):
    """By path, by `..`, by a link, by the home directory, until the message's own words are typed;
    inside the directory it is not.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net.pth").write_bytes(b"x")
    place = tmp_path / "model"
    for weights in (str(tmp_path / "net.pth"), "../net.pth", "link.pth", "~/net.pth", "net.pth"):
        model(place, weights=weights)
        if weights == "link.pth":
            (place / "link.pth").symlink_to(tmp_path / "net.pth")
        with pytest.raises(CodeNotTrusted, match="outside of the model's directory") as refused:
            load_model(place)
        typed = shlex.split(str(refused.value).partition("--trust-code ")[2])[0]
        assert load_model(place, trust_code=[typed])
        assert load_model(place, trust_code=[weights])
    absolute = str(tmp_path / "net.pth")
    model(place, weights=absolute)
    assert load_model(place, trust_code=[absolute])
    (place / "net.pth").write_bytes(b"x")
    model(place, weights="net.pth")
    assert load_model(place)


@pytest.mark.parametrize(
    ("made", "weights", "allowed"),
    [
        ("{here}/new/project/runs/r", "{here}/net.pth", True),  # it is where it was made
        ("/old/project/runs/r", "/old/project/net.pth", True),  # with the project
        ("/old/project/runs/r", "{here}/net.pth", False),
        ("/old/project/runs/r", "/old/../net.pth", False),
        ("/old/project/runs/r", "/old/project/link.pth", False),
    ],
)
def test_a_run_permits_the_files_of_its_project(tmp_path, made, weights, allowed):
    """Its recipe.json may be a stranger's, and names what it likes; a recipe that is typed may."""
    project = tmp_path / "new" / "project"
    weights = weights.format(here=tmp_path)
    model(project / "runs" / "r" / "winner", weights=weights)
    for path in (tmp_path / "net.pth", project / "net.pth"):
        path.write_bytes(b"x")
    (project / "link.pth").symlink_to(tmp_path / "net.pth")
    record = {"out": made.format(here=tmp_path), "backbones": [{"weights": weights}]}
    (project / "runs" / "r" / "recipe.json").write_text(json.dumps(record))
    if allowed:
        assert load_model(project / "runs" / "r")
        return
    with pytest.raises(CodeNotTrusted, match="outside of the model's directory"):
        load_model(project / "runs" / "r")
    (project / "recipe.yaml").write_text(
        "images: {folder: photos}\nout: runs/r\nheads: {logistic: {}}\n"
        f'backbones: [{{name: "torchvision:resnet18", weights: "{weights}", taps: [fc.avg]}}]\n'
    )
    if weights == str(tmp_path / "net.pth"):
        assert load_model(project / "recipe.yaml")


@pytest.mark.parametrize("name", ["../other", "/etc", "members/link"])
def test_a_member_outside_of_an_ensemble_is_refused(tmp_path, name):
    """Its members are in its directory."""
    model(tmp_path / "other")
    (tmp_path / "model" / "members").mkdir(parents=True)
    (tmp_path / "model" / "members" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="outside of the model's directory"):
        load_model(ensemble(tmp_path / "model", tmp_path / "other", names=[name]))


@pytest.mark.parametrize(
    "damage",
    [{"outputs": np.array([2**60])}, {"target": np.array([0, 9, 0, 1])}, {"sample_weight": None}],
)
def test_stored_rows_that_fit_nothing_are_told(damage):
    """An estimator is fitted again on rows of a file, and those may be damaged:

    HeadError, whatever it raises.
    """
    arrays = {
        "features": np.eye(4),
        "target": np.array([0, 1, 0, 1]),
        "sample_weight": np.ones(4),
        "outputs": np.array([2]),
    }
    arrays = {name: value for name, value in (arrays | damage).items() if value is not None}
    with pytest.raises(HeadError, match="fitted again"):
        fitted_sklearn(SklearnSpec("sklearn.naive_bayes.GaussianNB", "{}"), arrays, "single")
