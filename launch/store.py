"""A rendezvous on a host that does not train: `python -m launch.store PORT`, until it is killed."""

from __future__ import annotations

import datetime
import signal
import sys
from collections.abc import Sequence

import torch.distributed as dist


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve on the port; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1 or not given[0].isdecimal():
        print("usage: python -m launch.store PORT", file=sys.stderr)
        return 2
    stops = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        store = dist.TCPStore(
            "0.0.0.0",
            int(given[0]),
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=60),
        )
    except (dist.DistError, RuntimeError, OverflowError) as error:
        print(f"error: port {given[0]}: {error}", file=sys.stderr)
        return 1
    print(f"the rendezvous is on port {store.port}", flush=True)
    signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
