"""Where the memory of training goes: what autograd keeps, and the peak of a step."""

from ._saved import SavedForBackward, saved_for_backward

__all__ = ["SavedForBackward", "saved_for_backward"]
