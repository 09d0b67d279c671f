"""Tolerances of the gates, relative to the standard deviation of PyTorch's values.

They are not next to the cases, which calibration reads too: a changed tolerance does not quantize again.
"""

from __future__ import annotations

from collections.abc import Mapping

from builder.reference.case_file import Tolerance
from builder.reference.cases import Case

FP32 = 1e-4  # 2e-5 is what is seen
TOLERANCES: Mapping[Tolerance, float] = {"fp32": FP32, "tight": FP32 / 5}


def limit(case: Case) -> float:
    """The largest difference that passes a case's gates with a tolerance."""
    return TOLERANCES[case.tolerance]
