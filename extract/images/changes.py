"""Changes of a set of images since its last listing: new, changed, renamed, removed."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json


@dataclass(frozen=True)
class ListingChanges:
    """Every id of the new listing is in one of new, changed, renamed and unchanged."""

    new: tuple[str, ...]  # content and id were not there
    changed: tuple[str, ...]  # the id was there, with other content
    # (old id, new id): the content was there, under an id that is gone
    renamed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]  # ids that are gone and were not renamed
    unchanged: int


def compare_listings(before: Mapping[str, str], after: Mapping[str, str]) -> ListingChanges:
    """Compare two listings {id: content hash}.

    A copy of an image that is still there counts as new.
    """
    removed_ids: dict[str, list[str]] = defaultdict(list)  # content -> ids that had it and are gone
    for image_id in sorted(before.keys() - after.keys(), reverse=True):
        removed_ids[before[image_id]].append(image_id)
    new_ids, changed_ids, renamed_ids = [], [], []
    n_unchanged = 0
    for image_id, content_hash in after.items():
        if before.get(image_id) == content_hash:
            n_unchanged += 1
        elif image_id in before:
            changed_ids.append(image_id)
        elif removed_ids.get(content_hash):
            renamed_ids.append((removed_ids[content_hash].pop(), image_id))
        else:
            new_ids.append(image_id)
    unmatched_ids = sorted(
        image_id for ids_of_content in removed_ids.values() for image_id in ids_of_content
    )
    return ListingChanges(
        tuple(new_ids), tuple(changed_ids), tuple(renamed_ids), tuple(unmatched_ids), n_unchanged
    )


def read_listing(path: Path) -> dict[str, str]:
    """The listing that `write_listing` left; empty where there is none.

    Raises SealBroken where it is damaged.
    """
    try:
        listing: dict[str, str] = read_sealed_json(path.read_bytes())["images"]
    except FileNotFoundError:
        return {}
    except KeyError as error:
        raise SealBroken("it lists no images: it is of another version of headrace") from error
    return listing


def write_listing(path: Path, listing: Mapping[str, str]) -> None:
    """Replace the listing at `path`."""
    publish_replace(path, sealed_json({"images": dict(listing)}, indent=0))
