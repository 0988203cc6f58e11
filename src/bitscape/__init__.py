"""Mixed-precision quantization for vision networks: find the bits of each layer on a few samples,
train, export.

    import bitscape as bs

    policy = bs.search(model, data, "4bit").policy
    network = bs.quantize(model, policy, data)
    bs.export(network, "network.onnx", data)

A name is loaded when it is first used: `import bitscape` alone takes milliseconds and leaves torch out. The names are
listed in the stub beside this file.
"""

import lazy_loader

from bitscape.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
