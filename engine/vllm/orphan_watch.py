"""A process that ends itself when its parent is gone.

If a Serve replica is killed, vLLM's EngineCore and worker must not stay behind with the GPU's memory. Ray reaps
direct children of its workers, but not in every case, and never grandchildren.
"""

import os
import threading
import time

_INTERVAL_S = 0.5


def exit_with_parent() -> None:
    """Start a daemon thread that ends this process soon after its parent has died."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()
