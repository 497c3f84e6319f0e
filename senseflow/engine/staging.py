"""What copies the state of a save in the background to host memory."""

from torch.distributed.checkpoint import staging


def stager_of(pinned: bool) -> staging.DefaultStager:
    """One whose copies are done when it returns.

    It keeps its memory, since to pin some takes longer than to copy to it.
    """
    return staging.DefaultStager(
        staging.StagingOptions(
            use_pinned_memory=pinned,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=pinned,
        )
    )
