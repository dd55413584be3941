"""A process group inside the test process."""

from __future__ import annotations

import time


def leave_process_group() -> None:
    """``destroy_process_group`` once gloo's threads have let go of their last work.

    Letting go takes the GIL. The destructor joins those threads while it holds the GIL, so that a thread which comes
    late would wait for ever. Sleeping gives the GIL up.
    """
    from torch.distributed import destroy_process_group

    time.sleep(0.3)
    destroy_process_group()
