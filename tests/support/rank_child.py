"""One rank of `support.ranks.on_ranks`: import a function by file, call it, write its result."""

import importlib.util
import json
import os
import sys
from pathlib import Path

from moe_medical.distributed.topology import end_rank


def main() -> None:
    file, function, folder = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("rank_module", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rank_module"] = module
    spec.loader.exec_module(module)
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = getattr(module, function)(*arguments)
    (Path(folder) / f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    end_rank(0)
