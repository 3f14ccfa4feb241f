"""The provenance section: the recipe with defaults, versions, machines, fingerprints."""

import json

import pandas as pd
import yaml

from headrace.pipelines.finished import FinishedRun
from headrace.pipelines.number_format import bytes_text, utc_text
from headrace.pipelines.report.page.blocks import Block, Code, Column, Facts, Note, Section, Table


def provenance_section(run: FinishedRun) -> Section:
    facts = {
        "run": str(run.paths.root.absolute()),
        "features": str(run.recipe.cache),
        "task": f"{run.bank.task_digest} (digest of the rows, targets and folds)",
        "winner's results": run.bank.path.name,
        "winner's spec": run.winner.spec,
    }
    blocks: list[Block] = [
        Facts(facts),
        Code("The recipe, with every default", recipe_text(run)),
        *_machine_blocks(run),
        *_feature_blocks(run),
    ]
    lead = "With the same recipe, images and versions, headrace run gives these numbers again."
    return Section("provenance", "Recipe, versions, fingerprints", lead, tuple(blocks))


def recipe_text(run: FinishedRun) -> str:
    """Return the run's recipe as YAML, with every default."""
    values = run.recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _machine_blocks(run: FinishedRun) -> list[Block]:
    records = run.environments
    if records.empty:
        return [Note("The run was made by a version of headrace that did not record versions.")]
    rows = []
    for record in records.to_dict("records"):
        versions = {"python": record.get("python"), **dict(record.get("versions") or {})}
        memory_text = bytes_text(float(record.get("memory_bytes") or 0))
        # By key or default: records of earlier versions lack some.
        rows.append(
            {
                "since": utc_text(record.get("since", "")),
                "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
                "machine": f"{record.get('processor', '')}, {record.get('system', '')}, "
                f"{record.get('cores', '?')} cores, {memory_text} of memory",
                "used": f"{record.get('workers') or record.get('cores')} workers, forward pass on "
                f"{record.get('device', 'cpu')}",
            }
        )
    frame = pd.DataFrame(rows)
    columns = tuple(Column(name, name) for name in ("since", "versions", "machine", "used"))
    caption = "Versions and machines of the calls"
    return [Table("versions", caption, columns, frame, sortable=False, wide=True)]


def _feature_blocks(run: FinishedRun) -> list[Block]:
    """Return the feature sets' fingerprints; fields that all sets share are listed once."""
    rows = []
    for name, specs in run.feature_specs.items():
        for view, spec in enumerate(specs):
            rows.append(
                {
                    "name": name if len(specs) == 1 else f"{name}, view {view}",
                    "fingerprint": spec.fingerprint,
                    "backbone": spec.backbone,
                    "weights": spec.weights,
                    "preprocessing": "; ".join(
                        f"{key} {value}"
                        for key, value in json.loads(spec.preprocessing).items()
                        if value is not None
                    ),
                    "decoder": spec.decoder,
                    "dtype": f"{spec.dtype} of {spec.compute_dtype}",
                }
            )
    titles = {
        "backbone": "backbone",
        "weights": "weights (SHA-256)",
        "preprocessing": "preprocessing",
        "decoder": "decoder",
        "dtype": "stored, computed",
    }
    frame = pd.DataFrame(rows)
    # Said once for all: taps of one network differ in nothing but the tap.
    shared = {name: title for name, title in titles.items() if frame[name].nunique() == 1}
    columns = (
        Column("name", "feature set"),
        Column("fingerprint", "fingerprint"),
        *(Column(name, title) for name, title in titles.items() if name not in shared),
    )
    return [
        Facts({title: str(frame[name].iloc[0]) for name, title in shared.items()}),
        Table("fingerprints", "Fingerprints of the feature sets", columns, frame, sortable=False),
    ]
