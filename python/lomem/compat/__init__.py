"""Names of other libraries over lomem's functions, for programs that change their import and nothing else.

:mod:`lomem.compat.fewbit` takes the place of FewBit, :mod:`lomem.compat.lowmemorybp` that of LowMemoryBP.
docs/coming-from.md says what differs.
"""
