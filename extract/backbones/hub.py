"""Models of the Hugging Face hub: messages for those that cannot be downloaded."""

from collections.abc import Iterator

from headrace.extract.errors import BackboneError


def hub_message(name: str, model_id: str, error: BaseException) -> str | None:
    """Return the message for a model of the hub that is gated, absent or out of reach.

    name: as the user gave it. None if `error` has another cause.
    """
    from huggingface_hub import errors

    # Libraries wrap the hub's own exceptions.
    causes = list(_causes(error))

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    repository = model_id.partition("@")[0]
    if is_any(errors.GatedRepoError):
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{repository}, log in "
            "with `hf auth login`, and try again"
        )
    if is_any(errors.RevisionNotFoundError):
        return (
            f"{name}: the hub has no such revision of {repository}; leave `@…` or `weights` out "
            "for the newest"
        )
    if is_any(errors.RepositoryNotFoundError):
        return (
            f"{name}: the hub has no model {repository}, or it is private: check the name, or log "
            "in with `hf auth login`"
        )
    if is_any(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        return (
            f"{name} is not on this machine and the hub cannot be reached: fetch it where there is "
            f"a network (hf download {repository}), or name a folder that holds it"
        )
    if is_any(errors.EntryNotFoundError):
        return (
            f"{name}: the hub's {repository} lacks a file that this library needs: it is a model "
            "of another library (timm:hf-hub:, transformers: and open_clip:hf-hub: differ)"
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those from which, or while handling which, it was raised."""
    seen: set[int] = set()  # ids: a chain of causes may be a circle
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def require_hub_name(name: str, model_id: str) -> None:
    """Raise BackboneError unless it has the form of a name of the hub, ORG/NAME."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        try_to_load_from_cache(model_id.partition("@")[0], "config.json")
    except errors.HFValidationError as error:
        raise BackboneError(
            f"{name}: {model_id!r} is neither a folder nor a name of the hub, ORG/NAME"
        ) from error
