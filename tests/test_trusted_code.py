"""A file that somebody sends chooses no code: models name networks and estimators, and nothing is imported unasked."""

import json
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from headrace.cache import FeatureSpec
from headrace.heads import CodeNotTrusted, RidgeSpec, SklearnSpec, load_head, spec_to_json
from headrace.heads.predict import CannotPredict
from headrace.heads.sklearn_bank import estimator_code, fitted_sklearn, make_estimator
from headrace.pipelines.cli import app
from headrace.pipelines.deliver.model import ModelError, load_model

SENT = """\
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from sklearn.base import BaseEstimator, ClassifierMixin

def network():
    raise SystemExit("called")

class Classifier(ClassifierMixin, BaseEstimator):
    pass
"""


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """The file that appears when the module `sent_module`, which can be imported, is."""
    (tmp_path / "sent_module.py").write_text(SENT)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "imported"
    import sys

    sys.modules.pop("sent_module", None)


def model(place, *, backbone="timm:test_resnet", spec=None, weights="random:0"):
    """A model directory as somebody could write it by hand."""
    spec = spec or RidgeSpec(1.0)
    feature = FeatureSpec(backbone, "w" * 64, "fc", "avg", "{}", '{"index": 0}', "pillow", "float32", "float16", (4,))
    about = {
        "format": 1,
        "spec": json.loads(spec_to_json(spec)),
        "task_kind": "single",
        "classes": ["a", "b"],
        "features": [json.loads(feature.to_json())],
        "backbones": [{"name": backbone, "weights": weights}],
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
    [({"backbone": "python:sent_module:network"}, "sent_module:network"), ({"spec": OWN}, "sent_module:Classifier")],
)
def test_code_is_asked_for_and_not_imported(tmp_path, flag, asks, code):
    """A network of its own, an estimator by import path: the message names the code and the option, and nothing is imported."""
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


def test_a_head_alone_asks_in_the_same_words(tmp_path, flag):
    """`load_head`, the level below: an estimator that is not scikit-learn's own is loaded where it is named, and fitted then."""
    place = model(tmp_path / "model", spec=OWN)
    said = []
    for load in (load_head, load_model):
        with pytest.raises(CodeNotTrusted, match="--trust-code sent_module:Classifier") as refused:
            load(place)
        said.append(str(refused.value))
    assert said[0] == said[1]
    with pytest.raises(CodeNotTrusted):
        load_head(place, trust_code=["sent_module:network"])
    head = load_head(place, trust_code=["sent_module.Classifier"])
    assert not flag.exists()
    with pytest.raises(CannotPredict):  # it is a class without `fit`
        head.predict(np.eye(4))
    assert flag.exists()
    plain = load_head(model(tmp_path / "plain", spec=SklearnSpec("sklearn.naive_bayes.GaussianNB", "{}")))
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


def test_a_recipe_is_the_users_own_words(tmp_path):
    """The run of a recipe may use what the recipe names; the same run given by its directory has to be asked for."""
    (tmp_path / "recipe.yaml").write_text(
        "images: {folder: photos}\n"
        'backbones: [{name: "python:sent_module:network", taps: [fc.avg]}]\n'
        "heads: {sklearn: [{estimator: sent_module.Classifier}]}\n"
    )
    run = tmp_path / "headrace-runs" / "recipe"
    model(run / "winner", backbone="python:sent_module:network", spec=OWN)
    (run / "recipe.json").write_text("{}")
    assert set(load_model(tmp_path / "recipe.yaml").trust_code) == {"sent_module:network", "sent_module:Classifier"}
    with pytest.raises(CodeNotTrusted):
        load_model(run)
    model(run / "winner", backbone="python:sent_module:another")
    with pytest.raises(CodeNotTrusted, match="sent_module:another"):
        load_model(tmp_path / "recipe.yaml")


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
    ("sklearn.neighbors.KNeighborsClassifier", {"metric": "pyfunc", "metric_params": {"func": "os.system"}}),
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
    """Its classifiers and regressors with values for parameters: only scikit-learn's own code can come of them."""
    spec = SklearnSpec(name, json.dumps(parameters))
    assert estimator_code(spec) is None
    make_estimator(spec)


@pytest.mark.parametrize(("name", "parameters"), ASKS)
def test_estimators_that_can_hold_other_code_ask(name, parameters):
    """Nested estimators, functions, files of pickles, thousands of processes, private modules, all other packages."""
    assert estimator_code(SklearnSpec(name, json.dumps(parameters))) is not None


def test_a_weights_file_outside_of_the_model_is_asked_for(tmp_path, monkeypatch):
    """By path, by `..`, by a link, by the home directory, until the message's own words are typed; inside the directory, and
    where the run's recipe names it, it is not."""
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
    model(tmp_path / "run" / "winner", weights=absolute)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"backbones": [{"weights": absolute}]}))
    assert load_model(tmp_path / "run" / "winner")


@pytest.mark.parametrize("name", ["../other", "/etc", "members/link"])
def test_a_member_outside_of_an_ensemble_is_refused(tmp_path, name):
    """Its members are in its directory."""
    model(tmp_path / "other")
    (tmp_path / "model" / "members").mkdir(parents=True)
    (tmp_path / "model" / "members" / "link").symlink_to(tmp_path / "other")
    with pytest.raises(ModelError, match="outside of the model's directory"):
        load_model(ensemble(tmp_path / "model", tmp_path / "other", names=[name]))


@pytest.mark.parametrize(
    "damage", [{"outputs": np.array([2**60])}, {"target": np.array([0, 9, 0, 1])}, {"sample_weight": None}]
)
def test_stored_rows_that_fit_nothing_are_told(damage):
    """An estimator is fitted again on rows of a file, and those may be damaged: CannotPredict, whatever it raises."""
    arrays = {
        "features": np.eye(4),
        "target": np.array([0, 1, 0, 1]),
        "sample_weight": np.ones(4),
        "outputs": np.array([2]),
    }
    arrays = {name: value for name, value in (arrays | damage).items() if value is not None}
    with pytest.raises(CannotPredict, match="fitted again"):
        fitted_sklearn(SklearnSpec("sklearn.naive_bayes.GaussianNB", "{}"), arrays, "single")
