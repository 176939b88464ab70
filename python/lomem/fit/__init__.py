"""Best step functions for the derivative of any activation.

    >>> lomem.fit.fit("gelu", 3).boundaries
    >>> lomem.fit.fit(lambda x: x * torch.sigmoid(2 * x), 2, criterion="derivative", density=(0.0, 1.5)).step

Needs the optional packages of ``pip install 'lomem[fit]'``.
"""

try:
    import numpy
    import scipy
except ModuleNotFoundError as error:
    raise ImportError(f"lomem.fit needs the package {error.name}: pip install 'lomem[fit]'") from error

from ..steps import StepFunction
from ._fit import Certificate, Fit, fit

__all__ = ["Certificate", "Fit", "StepFunction", "fit"]
