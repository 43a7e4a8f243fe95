"""`moe-medical data check`: check a mixture's data, show the report, write it for machines and for people.

Needs no torch: tokens are counted with the base model's tokenizer file alone.
"""

from __future__ import annotations

from pathlib import Path

from moe_medical.base_model import locate_base
from moe_medical.config.schema import ModelSection
from moe_medical.console import show
from moe_medical.data.chat import ChatFormat
from moe_medical.data.check import CheckReport, check_recipe, show_report, write_page
from moe_medical.errors import ConfigError, DataError, Problem
from moe_medical.files import write_json

_NO_LIMIT = 2**40


def run_data_check(
    recipe: Path, base: str | None, length_limit: int | None, json_file: Path | None, html_file: Path | None
) -> None:
    """Check and tell; what is found in the data is no error.

    Args:
        recipe: The mixture's YAML.
        base: Base model whose tokens are counted; None counts characters.
        length_limit: Tokens of a sample at most, for the share above it; needs `base`.
        json_file: Where to write the whole report.
        html_file: Where to write the page.

    Raises:
        ConfigError: problems of the recipe or of the arguments.
        DataError: after the report is written, where files could not be used.
    """
    if length_limit is not None and base is None:
        fix = "Name the model whose tokens are meant."
        raise ConfigError("the command line", [Problem("--max-length", "needs --base", fix=fix)])
    report = check_recipe(recipe, _chat(base) if base else None, length_limit)
    show_report(report)
    if json_file is not None:
        _write_json(report, json_file)
    if html_file is not None:
        write_page(report, html_file)
        show(f"page: {html_file}")
    if report.errors:
        raise DataError("\n".join(report.errors))


def _chat(base: str) -> ChatFormat:
    return ChatFormat.from_folder(locate_base(ModelSection(base)).folder, None, _NO_LIMIT)


def _write_json(report: CheckReport, path: Path) -> None:
    write_json(path, report.to_json())
