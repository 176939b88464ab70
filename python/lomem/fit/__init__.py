"""Optimal step functions for the derivative of any activation.

    >>> lomem.fit.fit("gelu", 3).boundaries
    >>> lomem.fit.fit(lambda x: x * torch.sigmoid(2 * x), 2, criterion="derivative", density=(0.0, 1.5)).step

Requires the optional packages of ``pip install 'lomem[fit]'``.
"""

try:
    import numpy
    import scipy
except ModuleNotFoundError as error:
    raise ImportError(f"lomem.fit needs the package {error.name}: pip install 'lomem[fit]'") from error

from ..steps import StepFunction
from ._calibrate import Calibration, LayerCalibration, calibrate
from ._fit import Certificate, Fit, fit
from ._report import Fidelity, FidelityReport, report

__all__ = [
    "Calibration",
    "Certificate",
    "Fidelity",
    "FidelityReport",
    "Fit",
    "LayerCalibration",
    "StepFunction",
    "calibrate",
    "fit",
    "report",
]
