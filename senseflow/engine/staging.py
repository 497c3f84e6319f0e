"""What copies the state of a save in the background to host memory, by what this torch has."""

from torch.distributed.checkpoint import staging


def stager_of(pinned: bool) -> staging.AsyncStager:
    """One whose copies are done when it returns, for every save of a run.

    It keeps its memory, since to pin some takes longer than to copy to it; with torch 2.11 it keeps
    pinned memory alone.
    """
    stager = staging.DefaultStager(
        staging.StagingOptions(
            use_pinned_memory=pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=pinned,
        )
    )
    try:
        for _ in range(2):
            stager.stage({})
    except KeyError:  # torch 2.11's closes itself behind its first state
        return staging.BlockingAsyncStager(cache_staged_state_dict=pinned)
    return stager
