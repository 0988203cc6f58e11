"""The text of an OpenVINO graph without what OpenVINO finds out by itself: a small network has more graph than weights."""

from xml.etree import ElementTree

BROADCAST = {"Add", "Multiply", "Subtract", "FakeQuantize"}
"""Operators that broadcast as NumPy does unless their file says otherwise."""


def compact(xml: bytes) -> bytes:
    """The same graph in fewer characters.

    Shapes go, for OpenVINO infers them, and so do the types of inputs, attributes that hold defaults, and the names of all tensors but the
    network's own inputs and outputs.
    """
    root = ElementTree.fromstring(xml)
    results = {layer.get("id") for layer in root.iterfind("layers/layer[@type='Result']")}
    outputs = {(edge.get("from-layer"), edge.get("from-port")) for edge in root.iterfind("edges/edge") if edge.get("to-layer") in results}
    for layer in root.iter("layer"):
        for port in layer.iterfind("input/port"):
            _clear(port, "precision")
        for port in layer.iterfind("output/port"):
            named = layer.get("type") == "Parameter" or (layer.get("id"), port.get("id")) in outputs
            _clear(port, *(() if named else ("names",)))
        _drop_default(layer)
    for element in root.iter():
        element.text = element.tail = None  # indentation
    return b'<?xml version="1.0"?>' + ElementTree.tostring(root).replace(b" />", b"/>")


def _clear(port: ElementTree.Element, *attributes: str) -> None:
    for dimension in port.findall("dim"):
        port.remove(dimension)
    for attribute in attributes:
        port.attrib.pop(attribute, None)


def _drop_default(layer: ElementTree.Element) -> None:
    settings = layer.find("data")
    if settings is not None and layer.get("type") in BROADCAST and settings.get("auto_broadcast") == "numpy":
        del settings.attrib["auto_broadcast"]
        if not settings.attrib:
            layer.remove(settings)
