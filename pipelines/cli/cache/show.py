"""`headrace cache ls` and `show`."""

import dataclasses
import datetime
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cache.count_text import count_text
from headrace.cache.errors import CacheError
from headrace.cache.feature_set import FeatureSet, feature_set_directories, open_feature_set
from headrace.cache.publish import shard_path
from headrace.pipelines.cli.cache.find import (
    DEFAULT_CACHE,
    CacheOption,
    find_feature_set,
    print_line,
)
from headrace.pipelines.cli.completion import complete_feature_sets
from headrace.pipelines.cli.options import JsonOption, print_json
from headrace.pipelines.number_format import bytes_text

if TYPE_CHECKING:
    from headrace.pipelines.cli.json_output import FeatureSetOutput

# The largest quantization error of each dtype, relative to a value unless said otherwise.
_ERROR_BOUNDS = {
    "float16": "2^-11",
    "bfloat16": "2^-8",
    "float32": "2^-24",
    "uint8": "half a step of 1/255 of a channel's range",
}
_SHOWN_FAILURES = 20  # the others are counted


def list_command(cache: CacheOption = DEFAULT_CACHE, json_output: JsonOption = False) -> None:
    """List the feature sets: samples, tap, bytes, backbone, when, by what version.

    Example: headrace cache ls
    """
    from headrace.pipelines.cli.json_output import FeatureSetOutput

    directories = feature_set_directories(cache)
    outputs = []
    for directory in directories:
        try:
            outputs.append(_describe(open_feature_set(directory)))
        # Listed all the same: a broken one is what people look for.
        except CacheError:
            outputs.append(
                FeatureSetOutput(fingerprint=directory.name, path=str(directory), is_broken=True)
            )
    if json_output:
        print_json("cache ls", cache=cache, feature_sets=outputs)
        return
    if not outputs:
        print_line(f"{cache} holds no feature sets. `headrace run RECIPE` makes some.")
        return
    cache_option = "" if cache == DEFAULT_CACHE else f" --cache {shlex.quote(str(cache))}"
    for output in outputs:
        if output.is_broken:
            print_line(
                f"{output.fingerprint}  broken: headrace cache verify{cache_option} says what, "
                f"headrace cache repair{cache_option} repairs it"
            )
            continue
        written = output.last_written
        writers = ", ".join(output.written_by)
        # Two lines for each, to fit a narrow terminal.
        print_line(f"{output.fingerprint}  {output.backbone} {output.tap}")
        shape_text = f"{'x'.join(map(str, output.shape or ()))} {output.dtype}"
        print_line(
            f"    {count_text(output.rows or 0, 'row')} of {shape_text}, {output.failed:,} failed, "
            f"{bytes_text(output.bytes or 0)}; {written:%Y-%m-%d %H:%M} by {writers}"
            if written
            else "    nothing is written yet"
        )


def _describe(feature_set: FeatureSet) -> "FeatureSetOutput":
    from headrace.pipelines.cli.json_output import FeatureSetOutput

    spec = feature_set.spec
    return FeatureSetOutput(
        fingerprint=feature_set.path.name,
        path=str(feature_set.path.absolute()),
        is_broken=False,
        backbone=spec.backbone,
        tap=spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        rows=feature_set.n_rows,
        failed=sum(entry.failed for entry in feature_set.entries),
        bytes=feature_set.stored_bytes,
        last_written=_last_written(feature_set),
        written_by=tuple(sorted({entry.written_by for entry in feature_set.entries})),
    )


def show_command(
    name: Annotated[
        str,
        typer.Argument(
            help="A fingerprint (or its beginning), or a tap such as blocks.4.avg.",
            autocompletion=complete_feature_sets,
        ),
    ],
    cache: CacheOption = DEFAULT_CACHE,
    json_output: JsonOption = False,
) -> None:
    """Everything about one feature set: spec, shards, measured quantization error, failures.

    Example: headrace cache show 3fa9
    """
    feature_set = open_feature_set(find_feature_set(cache, name))
    described = _describe(feature_set)
    quantization_error = feature_set.quantization_error
    failures = feature_set.failures()
    spec_fields = dataclasses.asdict(feature_set.spec)
    shard_rows = [entry.rows for entry in feature_set.entries]
    if json_output:
        print_json(
            "cache show",
            **dict(described),
            spec=spec_fields,
            shards=len(shard_rows),
            largest_error=quantization_error.largest if quantization_error.squared else None,
            failures=failures,
        )
        return
    for field_name, value in spec_fields.items():
        print_line(f"{field_name:>14}  {value}")
    print_line(
        f"{'rows':>14}  {feature_set.n_rows:,} in {count_text(len(shard_rows), 'shard')} of "
        f"{min(shard_rows, default=0)} to {max(shard_rows, default=0)}"
    )
    print_line(f"{'bytes':>14}  {feature_set.stored_bytes:,} in {feature_set.path}")
    written = described.last_written
    print_line(f"{'last written':>14}  {written.isoformat(' ', 'minutes') if written else 'never'}")
    # Nothing is summed up where features were given in their dtype.
    if quantization_error.squared:
        measured_text = (
            f"largest {quantization_error.largest:.3g}, root mean square "
            f"{quantization_error.relative_rms:.2e} of the values'"
        )
    else:
        measured_text = "none, the features were given in this dtype"
    print_line(
        f"{'quantization':>14}  {measured_text} (bound of {feature_set.spec.dtype}: "
        f"{_ERROR_BOUNDS[feature_set.spec.dtype]}, measured when written)"
    )
    print_line(f"{'failed':>14}  {count_text(len(failures), 'sample')}")
    for failure in failures[:_SHOWN_FAILURES]:
        print_line(f"{'':>14}  {failure.id}: {failure.reason}")
    if len(failures) > _SHOWN_FAILURES:
        print_line(f"{'':>14}  and {len(failures) - _SHOWN_FAILURES} more")


def _last_written(feature_set: FeatureSet) -> datetime.datetime | None:
    """Return when a shard was last written, from the files' times: shards themselves have none, so
    that an extraction gives the same bytes whether it was interrupted or not.
    """
    write_times = []
    for entry in feature_set.entries:
        shard_file = shard_path(feature_set.path, entry.unit)
        if shard_file.exists():
            write_times.append(shard_file.stat().st_mtime)
    return datetime.datetime.fromtimestamp(max(write_times)).astimezone() if write_times else None
