"""What the verbs share: a parser with the contract's exit code, types of arguments, the run file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_medical.config import RunConfig, load_config
from moe_medical.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse with the contract's exit code for a wrong command line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def add_run_verb(verbs, name: str, verb, description: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=description)
    parser.add_argument("run", metavar="RUN.yaml", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.steps=100")
    parser.set_defaults(verb=verb)
    return parser


def read_config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.run, options.overrides)
