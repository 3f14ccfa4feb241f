"""`headrace schema`: JSON Schemas of the recipe and of what commands print with `--json`."""

import json
from typing import Annotated, Any

import pydantic
import typer
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from headrace.cache.errors import HeadraceError
from headrace.extract.errors import nearest_names
from headrace.pipelines.console import utf8_stdout

RECIPE = "recipe"


class UnknownSchema(HeadraceError, ValueError):
    """There is no schema of that name."""


def schema_command(
    name: Annotated[
        list[str] | None,
        typer.Argument(
            help="recipe, or a command that takes --json: run, status, cache ls, 'run --dry-run' …"
        ),
    ] = None,
) -> None:
    """Print a JSON Schema: of recipes, for editors, or of what a command prints with --json.

    Example: headrace schema recipe
    """
    with utf8_stdout() as stream:
        stream.write(json.dumps(schema(" ".join(name or [RECIPE])), indent=2) + "\n")


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of that name. Raises UnknownSchema."""
    from headrace.pipelines.cli.json_output import OUTPUTS
    from headrace.pipelines.recipe.load import Recipe

    models: dict[str, type[pydantic.BaseModel]] = {RECIPE: Recipe, **OUTPUTS}
    if name not in models:
        raise UnknownSchema(
            f"there is no schema {name!r}. The nearest: {nearest_names(name, models)}; there are "
            f"{', '.join(models)}"
        )
    if name == RECIPE:
        content = Recipe.model_json_schema(schema_generator=_RecipeSchema)
    else:
        content = models[name].model_json_schema(mode="serialization")
    return {"$schema": GenerateJsonSchema.schema_dialect, **content}


class _RecipeSchema(GenerateJsonSchema):
    """The schema with each key's comment as its description, which editors show."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        from headrace.pipelines.recipe.field_comments import field_comments

        section = super().model_schema(schema)
        for key, comment in field_comments(schema["cls"]).items():
            if comment and key in section.get("properties", {}):
                section["properties"][key]["description"] = comment
        return section
