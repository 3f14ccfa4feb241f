"""JSON Schemas of the recipe and of the objects that commands print with `--json`."""

from typing import Any

import pydantic
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import ModelSchema

from headrace.extract.errors import nearest_names
from headrace.pipelines.errors import InvalidInput

RECIPE = "recipe"


def schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the recipe or of a command's object.

    Raises InvalidInput for any other name.
    """
    from headrace.pipelines.cli.json_output import OUTPUTS
    from headrace.pipelines.recipe.load import Recipe

    models: dict[str, type[pydantic.BaseModel]] = {RECIPE: Recipe, **OUTPUTS}
    if name not in models:
        raise InvalidInput(
            f"there is no schema {name!r}. The nearest: {nearest_names(name, models)}; there are "
            f"{', '.join(models)}"
        )
    # A recipe is read and so its schema is of the input; objects are printed.
    if name == RECIPE:
        content = Recipe.model_json_schema(schema_generator=_RecipeSchema)
    else:
        content = models[name].model_json_schema(mode="serialization")
    return {"$schema": GenerateJsonSchema.schema_dialect, **content}


class _RecipeSchema(GenerateJsonSchema):
    """Takes the comment behind each key in the source as its description, which editors show."""

    def model_schema(self, schema: ModelSchema) -> JsonSchemaValue:
        from headrace.pipelines.recipe.field_comments import field_comments

        section = super().model_schema(schema)
        for key, comment in field_comments(schema["cls"]).items():
            if comment and key in section.get("properties", {}):
                section["properties"][key]["description"] = comment
        return section
