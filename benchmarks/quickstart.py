"""The quickstart as a stranger meets it: fresh clone, empty home, new virtual environment, both timed.

    python benchmarks/quickstart.py        # writes benchmarks/results/quickstart.json

Needs nothing but the standard library, git and make. Memory is the proportional set size, summed over all
processes of the command and sampled twice a second. What improved is read back from the W&B offline file,
not from our own record.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "quickstart.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        clone, home = Path(scratch) / "clone", Path(scratch) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        printed = Path(scratch) / "printed"
        install_seconds, _ = timed(["make", "install"], clone, home, printed)
        run_seconds, peak_bytes = timed(["make", "quickstart"], clone, home, printed)
        read_back = [str(clone / ".venv/bin/python"), str(clone / "benchmarks/read_wandb.py")]
        tests = os.environ | {"PYTHONPATH": str(clone / "tests")}
        command = [*read_back, str(clone / "runs/quickstart")]
        told = subprocess.check_output(command, text=True, env=tests)
        record = {
            "seconds_total": round(install_seconds + run_seconds, 1),
            "seconds_install": round(install_seconds, 1),
            "seconds_quickstart": round(run_seconds, 1),
            "peak_memory_bytes": peak_bytes,
            **json.loads(told),
            "printed": printed.read_text().splitlines()[1:],
            "commit": git("rev-parse", "HEAD"),
            "machine": machine(),
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in record.items() if k != "printed"}, indent=1) + "\n")


def timed(command: list[str], folder: Path, home: Path, printed: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a command with an empty home; its standard output goes into `printed`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_MEDICAL_", "XDG_", "VIRTUAL_ENV"))}
    environment = kept | {"HOME": str(home), "WANDB_MODE": "offline"}
    began, peak = time.monotonic(), 0
    with printed.open("w") as stdout:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout)
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, family(process.pid))))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - began, peak


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in family(int(child)))]


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def machine() -> dict[str, object]:
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = cpu[0].split(":")[1].strip() if cpu else platform.processor()
    return {"cpu": name, "cores": os.cpu_count(), "memory_bytes": memory, "system": platform.system()}


if __name__ == "__main__":
    main()
