"""The verbs. Each parses its arguments, calls one function, and ends with an exit code of the contract.

Heavy imports happen inside the verbs: `plan` needs no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from moe_medical import __version__
from moe_medical.cli.adapter_verbs import add_adapter_verbs
from moe_medical.cli.parsing import Parser
from moe_medical.cli.run_verbs import add_run_verbs, evaluate_run_file, train
from moe_medical.console import complain, setup_logging
from moe_medical.errors import MoeMedicalError
from moe_medical.training.supervisor import may_tell_error

_LOG = logging.getLogger(__name__)


def run() -> NoReturn:
    """The command `moe-medical`: one verb, then out."""
    code = main()
    if "torch.distributed" in sys.modules:  # this may have been a rank
        from moe_medical.distributed.topology import end_rank

        end_rank(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    options = _parse(arguments)
    ranked = options.verb in (train, evaluate_run_file)  # elsewhere a launcher's variables mean nothing
    setup_logging(is_main=not ranked or os.environ.get("RANK", "0") == "0")
    try:
        return int(options.verb(options))
    except MoeMedicalError as e:
        if not ranked or may_tell_error():
            complain(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `moe-medical plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0
    except Exception:
        _LOG.exception("internal error; please report it")
        return MoeMedicalError.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not see overrides that stand behind an option.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moe-medical", description="Train medical LLMs as mixtures of low-rank experts.")
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts it before the verb.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    add_run_verbs(verbs)
    add_adapter_verbs(verbs)
    return parser
