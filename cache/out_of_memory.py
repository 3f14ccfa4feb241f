"""Whether an error says that memory is used up, for what then tries a smaller batch or group."""

_TEXTS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or this machine has too little memory for what raised the error."""
    # Only the allocators of CUDA and XPU have an exception for it: libraries of CUDA name a status,
    # MPS, pinned memory and torch on a CPU have only a text. By its name, because many processes do
    # not import torch.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(text in str(error) for text in _TEXTS)
    )
