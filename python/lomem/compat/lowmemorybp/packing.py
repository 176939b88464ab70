"""LowMemoryBP's ``lomem.packing``."""

from ...functional import pack_bool_to_uint8, unpack_uint8_to_bool

__all__ = ["pack_bool_to_uint8", "unpack_uint8_to_bool"]
