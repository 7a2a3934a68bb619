"""What was done to each parameter: for people, for programs, and beside the weights that it was done to."""

from safedelta_hf.report.report import Report

__all__ = ["Report"]
