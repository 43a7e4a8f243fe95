"""`moe-medical data check`: what is in the data of a mixture, and what is wrong with it."""

from moe_medical.data.check.measure import CheckReport, check_recipe
from moe_medical.data.check.page import write_page
from moe_medical.data.check.tables import show_report

__all__ = ["CheckReport", "check_recipe", "show_report", "write_page"]
