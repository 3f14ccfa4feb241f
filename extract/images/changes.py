"""Changes of a source since its last listing: images that are new, changed, renamed or removed."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.cache.atomic_io import publish_replace
from headrace.cache.format.sealed import SealBroken, read_sealed_json, sealed_json


@dataclass(frozen=True)
class ListingChanges:
    """Difference of two listings, by ids: an id is at most one of new, changed and renamed."""

    new: tuple[str, ...]  # neither the id nor, under an id that is gone, the content was there
    changed: tuple[str, ...]  # the id was there, with other content
    # (old id, new id): the content was there, under an id that is gone
    renamed: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]  # ids that are gone and were not renamed


def compare_listings(before: Mapping[str, str], after: Mapping[str, str]) -> ListingChanges:
    """Compare two listings {id: content hash}.

    A copy of an image that is still there counts as new.
    """
    # {content hash: ids that had it and are gone}, in reverse order for `pop`
    removed_ids: dict[str, list[str]] = defaultdict(list)
    for image_id in sorted(before.keys() - after.keys(), reverse=True):
        removed_ids[before[image_id]].append(image_id)
    new_ids, changed_ids, renamed_ids = [], [], []
    for image_id, content_hash in after.items():
        if before.get(image_id) == content_hash:
            continue
        if image_id in before:
            changed_ids.append(image_id)
        elif removed_ids.get(content_hash):
            renamed_ids.append((removed_ids[content_hash].pop(), image_id))
        else:
            new_ids.append(image_id)
    unmatched_ids = sorted(itertools.chain(*removed_ids.values()))
    return ListingChanges(
        tuple(new_ids), tuple(changed_ids), tuple(renamed_ids), tuple(unmatched_ids)
    )


def read_listing(path: Path) -> dict[str, str]:
    """Return the listing that `write_listing` wrote; {} if there is none.

    Raises SealBroken if it is damaged.
    """
    try:
        listing: dict[str, str] = read_sealed_json(path.read_bytes())["images"]
    except FileNotFoundError:
        return {}
    except KeyError as error:
        raise SealBroken("it lists no images: it is of another version of headrace") from error
    return listing


def write_listing(path: Path, listing: Mapping[str, str]) -> None:
    """Write a listing {id: content hash}, replacing the one at `path`."""
    publish_replace(path, sealed_json({"images": dict(listing)}, indent=0))
