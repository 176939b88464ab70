"""Measures training memory: what autograd saves for backward, and the peak of a training step."""

from ._fake import estimate, fake
from ._measured import measured_peak
from ._norms import NormOutput
from ._peak import Peak, StepPeak, step_peak
from ._profile import ModuleBytes, Profile, Shared, Unaccounted, profile
from ._report import Report, plot
from ._saved import SavedForBackward, saved_for_backward

__all__ = [
    "ModuleBytes",
    "NormOutput",
    "Peak",
    "Profile",
    "Report",
    "SavedForBackward",
    "Shared",
    "StepPeak",
    "Unaccounted",
    "estimate",
    "fake",
    "measured_peak",
    "plot",
    "profile",
    "saved_for_backward",
    "step_peak",
]
