"""No secret of the environment is in anything that a run prints or writes, though its run file names it."""

from __future__ import annotations

import secrets
import string
from pathlib import Path

import pytest
import yaml
from support.launches import LAUNCH, run_to_end
from support.searching import files_holding
from support.tiny import write_tiny_run
from support.wandb_file import read_run


def drawn(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def secret_environment() -> dict[str, str]:
    """Secrets of today's looks, drawn anew so that no file of the project can hold them."""
    mixed = string.ascii_letters + string.digits
    return {
        "WANDB_API_KEY": drawn("0123456789abcdef", 40),
        "HF_TOKEN": "hf_" + drawn(mixed, 34),
        "AWS_ACCESS_KEY_ID": "AKIA" + drawn(string.ascii_uppercase + string.digits, 16),
        "AWS_SECRET_ACCESS_KEY": "aA1" + drawn(mixed + "+/", 37),
    }


@pytest.mark.timeout(200)
def test_no_secret_leaves_the_run(tmp_path: Path) -> None:
    hidden = secret_environment()
    run = write_tiny_run(
        tmp_path,
        training={"steps": 2},
        parallel={"ranks": 1},
        evaluation={"loss_rows": 2, "score_rows": 0},
        tracking={
            "wandb": {
                "enabled": True,
                "group": "${oc.env:HF_TOKEN}",
                "tags": ["kept", "${oc.env:AWS_SECRET_ACCESS_KEY}", "${oc.env:AWS_ACCESS_KEY_ID}"],
                "project": "${oc.env:WANDB_API_KEY}",
            },
            "sinks": ["tensorboard", "trackio"],
        },
    )
    home = tmp_path / "home"
    home.mkdir()
    surroundings = hidden | {"HOME": str(home), "WANDB_MODE": "offline", "TMPDIR": str(home)}
    surroundings |= {"MOE_MEDICAL_CACHE": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(home)}
    code, output = run_to_end([*LAUNCH, str(run)], tmp_path / "output.txt", **surroundings)
    assert code == 0, output
    assert files_holding(hidden.values(), tmp_path) == []
    followed = read_run(tmp_path / "run")
    assert followed.tags == ("kept", "<redacted>", "<redacted>")
    assert followed.config["tracking"]["wandb"]["group"] == "<redacted>"
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["tracking"]["wandb"]["tags"] == ["kept", "<redacted>", "<redacted>"]
    (tmp_path / "leak.txt").write_text(f"x{hidden['HF_TOKEN']}y")
    assert files_holding(hidden.values(), tmp_path) == ["leak.txt"]  # the search finds what is there
