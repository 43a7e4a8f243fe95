"""Child of `TrackioSink`: one JSON message per line of standard input, until it ends."""

from __future__ import annotations

import json
import sys


def main(project: str) -> None:
    """Log every message to a new run of `project`."""
    import trackio

    run = trackio.init(project, name=project, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for line in sys.stdin:
        message = json.loads(line)
        if "values" in message:
            run.log(message["values"], message["step"])
        else:
            run.alert(message["title"], message["text"])
    run.finish()


if __name__ == "__main__":
    main(sys.argv[1])
