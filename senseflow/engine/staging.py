"""What copies the state of a save in the background to host memory, by what this torch has."""

from torch.distributed.checkpoint import staging


def stager_of(pinned: bool) -> staging.AsyncStager:
    """One whose copies are done when it returns.

    It keeps its memory, since to pin some takes longer than to copy to it; that of torch 2.8 keeps
    pinned memory alone.
    """
    if not hasattr(staging, "DefaultStager"):
        return staging.BlockingAsyncStager(cache_staged_state_dict=pinned)
    options = staging.StagingOptions(
        use_pinned_memory=pinned,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=pinned,
    )
    return staging.DefaultStager(options)
