"""`--json` on every command, against its schema; progress, quiet and verbose calls."""

import json
import re

import jsonschema
import pytest
import yaml
from support.runs import HEADS, RECIPE, headrace, make_photos
from typer.main import get_command

from headrace.pipelines.cli.json_error import commands_in
from headrace.pipelines.cli.json_output import ERROR, OUTPUTS
from headrace.pipelines.cli.main import app
from headrace.pipelines.cli.schema import schema
from headrace.pipelines.console import make_console
from headrace.pipelines.errors import InvalidInput
from headrace.pipelines.planning import recipe_inputs
from headrace.pipelines.planning.run_state import read_run_state
from headrace.pipelines.recipe.load import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with photos and a recipe."""
    folder = tmp_path_factory.mktemp("json")
    make_photos(folder / "photos")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def call(command, *arguments, **options):
    """What a command prints with --json, which is valid by its schema."""
    return call_and_errors(command, *arguments, **options)[0]


def call_and_errors(command, *arguments, cwd, code=0):
    """The same, and what stands on the standard error."""
    done = headrace(*command.split(), *arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    output = json.loads(done.stdout)  # one object, and nothing else
    jsonschema.validate(output, schema(command))
    return output, done.stderr


@pytest.fixture(scope="module")
def run_call(folder):
    """The dry run before, the run itself, and what it wrote to the standard error."""
    plan = call("run --dry-run", "recipe.yaml", cwd=folder)
    return plan, *call_and_errors("run", "recipe.yaml", cwd=folder)


@pytest.mark.slow
def test_plan_and_run(run_call, folder):
    """The plan counts what the run then does, and the result is that of the files."""
    plan, result, _ = run_call
    assert plan["heads_new"] == plan["heads_total"] == HEADS
    assert (plan["images"], plan["images_new"], plan["folds"]) == (60, 60, 3)
    assert plan["counts"]["found"] == plan["counts"]["train"] + plan["counts"]["test"] == 60
    assert [each["name"] for each in plan["features"]] == [
        "layer1.avg",
        "layer2.max",
        "layer4.avg",
    ]
    assert result["settings"] == HEADS // 3 == len(result["leaderboard"])
    assert result["winner"] == result["leaderboard"][0]
    assert result["winner"]["score"] == max(each["score"] for each in result["leaderboard"])
    assert result["test"]["images"] == 15
    saved = json.loads((folder / "headrace-runs/recipe/selection.json").read_text())
    assert result["expected"]["value"] == pytest.approx(saved["expected"])
    again = call("run --dry-run", "recipe.yaml", cwd=folder)
    assert (again["heads_new"], again["images_new"]) == (0, 0)


@pytest.mark.slow
def test_what_follows_a_run(run_call, folder):
    """Status, report, advice, prediction and export."""
    status = call("status", "recipe.yaml", cwd=folder)
    assert [driver["state"] for driver in status["drivers"]] == ["finished"]
    assert call("report", "recipe.yaml", cwd=folder)["missing_images"] == 0
    assert call("advise", "recipe.yaml", "-q", cwd=folder)["action"] == "head"
    predicted = call("predict", "recipe.yaml", "photos", "-q", "-o", "p.csv", cwd=folder)
    assert (predicted["images"], predicted["failed"]) == (60, 0)
    assert sum(predicted["counts"].values()) == 60
    exported = call("export", "recipe.yaml", "model", cwd=folder)
    assert set(exported["differences"]) == {"torch", "safetensors"}
    refused = headrace("predict", "recipe.yaml", "photos", "-o", "-", "--json", cwd=folder)
    assert refused.returncode == 2
    assert "give --out a file" in json.loads(refused.stdout)["error"]["message"]


@pytest.mark.slow
def test_caches(run_call, folder):
    """Listing, verification, repair, export, removal."""
    listed = call("cache ls", cwd=folder)["feature_sets"]
    assert {each["tap"]: each["rows"] for each in listed} == {
        "layer1.avg": 60,
        "layer2.max": 60,
        "layer4.avg": 60,
    }
    shown = call("cache show", "layer1.avg", cwd=folder)
    assert shown["spec"]["backbone"] == "torchvision:resnet18"
    assert shown["rows"] == 60
    verified = call("cache verify", "--recipe", "recipe.yaml", "--sources", cwd=folder)
    assert verified["problems"] == 0
    exported = call("cache export", "layer1.avg", "rows.npy", cwd=folder)
    assert "rows.npy" in exported["files"][0]
    imported = call(
        "cache import", "rows.npy", "--name", "mine", "--recipe", "recipe.yaml", cwd=folder
    )
    assert imported["rows"] == 60
    assert call("cache gc", cwd=folder)["paths"] == []
    make_photos(folder / "others", 2, seed=9)  # of no recipe, predicted into the same cache
    call(*("predict", "recipe.yaml", "others", "-q", "-o", "o.csv", "--update-cache"), cwd=folder)
    verified = call("cache verify", "--recipe", "recipe.yaml", "--sources", cwd=folder)
    assert (verified["problems"], {each["is_harmless"] for each in verified["sources"]}) == (
        0,
        {True},
    )
    shard = next((folder / "headrace-cache/features" / shown["fingerprint"] / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-9])
    damaged = call("cache verify", "layer1.avg", cwd=folder, code=1)
    assert damaged["problems"] == 1
    repaired = call("cache repair", "layer1.avg", cwd=folder)
    assert repaired["feature_sets"][0]["removed"] == [shard.stem]
    removed = call("cache rm", "layer1.avg", "--yes", cwd=folder)
    assert removed["path"].endswith(shown["fingerprint"])


@pytest.mark.slow
def test_what_there_is(folder):
    """Backbones, the machine, a certificate, a recipe."""
    named = call("backbones", "torchvision:resnet18", cwd=folder)
    assert named["backbone"]["parameters"] == 11_689_512
    assert "timm:resnet18" in call("backbones", "resnet18", cwd=folder)["names"]
    findings = call("doctor", "recipe.yaml", cwd=folder)["findings"]
    assert {each["state"] for each in findings} <= {"ok", "note"}
    assert call("cluster tls", "tls", cwd=folder)["folder"] == str(folder / "tls")
    assert call("init", "photos", "-o", "new.yaml", cwd=folder)["found"].startswith("60 images")


WITHOUT_RESULT = {  # the arguments, and the words of what went wrong
    "init": (["nowhere", "-o", "new.yaml"], "nowhere"),
    "run": (["broken.yaml"], "flods"),
    "run --dry-run": (["broken.yaml"], "flods"),
    "extract": (["photos"], "--backbone timm:resnet18"),
    "extract --dry-run": (["broken.yaml"], "flods"),
    "status": (["recipe.yaml"], "headrace run"),
    "report": (["recipe.yaml"], "headrace run"),
    "advise": (["recipe.yaml"], "headrace run"),
    "predict": (["recipe.yaml", "photos"], "headrace run"),
    "export": (["recipe.yaml", "model"], "headrace run"),
    "backbones": (["timm:nosuch"], "nosuch"),
    "doctor": (["--fast"], "--fast"),
    "cache ls": (["--all"], "--all"),
    "cache show": (["layer1.avg"], "layer1.avg"),
    "cache verify": (["--sources"], "--recipe recipe.yaml"),
    "cache repair": (["layer9.avg"], "layer9.avg"),
    "cache gc": (["--cache", "nowhere"], "nowhere"),
    "cache rm": (["layer1.avg"], "layer1.avg"),
    "cache export": (["layer1.avg"], "Missing argument"),
    "cache import": (["rows.npy", "--name", "mine", "--recipe", "broken.yaml"], "flods"),
    "cluster tls": ([], "Missing argument"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in OUTPUTS if name != ERROR])
def test_a_call_without_result_prints_one_error(command, tmp_path):
    """An object on the standard output and nothing else; the same words on the standard error."""
    make_photos(tmp_path / "photos", 2)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "broken.yaml").write_text(RECIPE.replace("folds", "flods"))
    arguments, words = WITHOUT_RESULT[command]
    done = headrace(*command.split(), *arguments, "--json", cwd=tmp_path)
    output = json.loads(done.stdout)
    jsonschema.validate(output, schema(ERROR))
    error = output["error"]
    assert error["exit_status"] == done.returncode == 2
    assert words in error["message"]
    assert error["message"].split()[-1].strip("'") in done.stderr
    assert all(command in error["message"] for command in error["next"])
    assert (words != "headrace run") or "headrace run recipe.yaml" in error["next"]


def test_a_value_for_json_is_refused_with_an_error_object(tmp_path):
    """A call that gives --json a value wants JSON, and gets it with the refusal."""
    refused = headrace("doctor", "--json=1", cwd=tmp_path)
    assert "does not take a value" in json.loads(refused.stdout)["error"]["message"]
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("raised", "status", "kind", "words"),
    [
        ("KeyboardInterrupt", 130, "KeyboardInterrupt", "Interrupted"),
        ("MemoryError", 2, "MemoryError", "no more memory"),
        ("OSError(28, 'No space left on device')", 2, "OSError", "No space left"),
        ("ZeroDivisionError('a fault')", 1, "ZeroDivisionError", "a fault"),
    ],
)
def test_what_ends_a_command_from_outside_is_an_error(raised, status, kind, words, folder):
    """Ctrl-C, the machine and faults of headrace, of which the standard error has the traceback."""
    first = (
        "from headrace.pipelines.planning import run_state\n"
        f"def fail(*_, **__): raise {raised}\n"
        "run_state.read_run_state = fail"
    )
    done = headrace("run", "recipe.yaml", "--dry-run", "--json", cwd=folder, first=first)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_status"], error["kind"]) == (status, status, kind)
    assert words in error["message"]
    assert ("Traceback" in done.stderr) == (status == 1)


def test_commands_in_messages():
    """Between back-quotes, or after a colon up to the end of the sentence."""
    assert commands_in("no library. Try: pip install 'headrace[onnx]'") == (
        "pip install 'headrace[onnx]'",
    )
    assert commands_in("`headrace run A` and `headrace cache rm` (or: headrace doctor)") == (
        "headrace run A",
        "headrace cache rm",
        "headrace doctor",
    )
    assert commands_in("Go on with: headrace run a.yaml. Nothing is lost") == (
        "headrace run a.yaml",
    )
    assert commands_in("headrace: no such file") == ()
    # names of files with blanks, capitals and stops, as shells quote them
    assert commands_in("Type: headrace run 'My, Run. B.yaml'. Nothing is lost") == (
        "headrace run 'My, Run. B.yaml'",
    )
    assert commands_in("Type: rm /Data/Old.json (in Python: nothing)") == ("rm /Data/Old.json",)
    assert commands_in("write one with: headrace init .") == ("headrace init .",)
    assert commands_in("type: headrace run ../A.yaml\nand: rm b.") == (
        "headrace run ../A.yaml",
        "rm b",
    )


def test_every_command_has_json_and_a_schema():
    """No command is left out, and none of the schemas is of a command that is gone."""
    commands = set()

    def walk(command, name):
        for child, inner in getattr(command, "commands", {}).items():
            full_name = f"{name} {child}".strip()
            if hasattr(inner, "commands"):
                walk(inner, full_name)
            elif any("--json" in parameter.opts for parameter in inner.params):
                commands.add(full_name)
            else:
                assert full_name in ("demo", "schema")

    walk(get_command(app), "")
    assert commands | {"run --dry-run", "extract --dry-run", ERROR} == set(OUTPUTS)
    for name in OUTPUTS:
        jsonschema.Draft202012Validator.check_schema(schema(name))
    with pytest.raises(InvalidInput, match="nearest: status"):
        schema("statsu")


def test_the_schema_of_recipes(folder):
    """It takes the recipes that headrace takes, says what each key means, and refuses other keys;
    `init` writes it beside the recipe, which names it.
    """
    recipe_schema = schema("recipe")
    headrace("init", "photos", "-o", "written.yaml", cwd=folder)
    text = (folder / "written.yaml").read_text()
    schema_name = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)[1]
    assert json.loads((folder / schema_name).read_text()) == recipe_schema
    for recipe in (yaml.safe_load(RECIPE), yaml.safe_load(text)):
        jsonschema.validate(recipe, recipe_schema)
    with pytest.raises(jsonschema.ValidationError, match="flods"):
        jsonschema.validate({**yaml.safe_load(RECIPE), "task": {"flods": 3}}, recipe_schema)
    properties = recipe_schema["$defs"]["TaskSection"]["properties"]
    assert all(each.get("description") for each in properties.values())


@pytest.mark.slow
def test_progress_goes_to_the_standard_error(run_call, folder):
    """Lines with the time, or JSON when asked; nothing when quiet; tasks when verbose."""
    # By `call`, the standard output is one object.
    assert re.search(rf"^\d\d:\d\d:\d\d train {HEADS}/{HEADS} heads", run_call[2], re.MULTILINE)
    assert "finished" not in run_call[2]
    arguments = ("run", "recipe.yaml", "--set", "heads.mlp=null", "--set", "heads.logistic.C=[1]")
    arguments += ("--set", "compute.workers=1", "--set")
    lines = headrace(*arguments, "task.seed=2", "--progress", "json", cwd=folder).stderr
    assert json.loads(lines.splitlines()[-1]) | {"per_s": 0, "left_s": 0} == {
        "stage": "train",
        "done": 12,
        "total": 12,
        "unit": "heads",
        "failed": 0,
        "per_s": 0,
        "left_s": 0,
    }
    assert headrace(*arguments, "task.seed=3", "--quiet", cwd=folder).stderr == ""
    verbose = headrace(*arguments, "task.seed=4", "-v", cwd=folder).stderr
    assert re.search(r"^\d\d:\d\d:\d\d finished \S+ · ", verbose, re.MULTILINE)


def test_the_reading_of_many_files_is_shown(folder, monkeypatch, capsys):
    """Before anything is extracted; of few files nothing is said."""
    recipe = load_recipe(folder / "recipe.yaml", settings=["cache=another"])
    read_run_state(recipe, write=False, console=make_console(stderr=True))
    assert "files" not in capsys.readouterr().err
    monkeypatch.setattr(recipe_inputs, "_MANY_FILES", 50)
    read_run_state(recipe, write=False, console=make_console(stderr=True))
    assert " read 60/60 files" in capsys.readouterr().err
