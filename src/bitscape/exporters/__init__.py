"""A quantized network as a file: small, complete, and read back bit for bit."""

from bitscape.exporters.packed.file import PackedInfo, load_packed, save_packed

__all__ = ["PackedInfo", "load_packed", "save_packed"]
