"""Google Model Explorer: node data, which color an exported program by bits or by sensitivity.

    program = torch.export.export(model, (images[:1],))
    torch.export.save(program, "network.pt2")
    Path("bits.json").write_text(json.dumps(adapters.to_model_explorer(policy, program)))

Then open network.pt2 in Model Explorer and load bits.json as custom node data.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch.export import ExportedProgram

from bitscape.errors import BitscapeError, nearest
from bitscape.policy import Policy
from bitscape.searches.scores import ScoreTable

NodeValue = Literal["weight", "activation", "score"]
TITLES: Mapping[NodeValue, str] = {
    "weight": "weight bits",
    "activation": "activation bits",
    "score": "score at the policy's bits",
}
GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d9722e"})
"""From the least value to the greatest."""


def to_model_explorer(
    policy: Policy,
    program: ExportedProgram,
    *,
    value: NodeValue = "weight",
    scores: ScoreTable | None = None,
) -> dict[str, Any]:
    """Return node data for Model Explorer, for every node of the policy's layers.

    Args:
        policy: bits of every layer.
        program: what `torch.export.export` made of the float network; Model Explorer shows its
            file.
        value: what nodes show: "weight" or "activation" bits, or the "score" of the layer at its
            bits, which says how much they cost in accuracy.
        scores: of the search, for "score"; layers that were pinned have none and show nothing.

    Raises:
        BitscapeError: an unknown value, a layer that the program does not have, or scores of other
            layers or bits.
    """
    if value not in get_args(NodeValue):
        raise BitscapeError(
            f"value={value!r}: use one of {', '.join(get_args(NodeValue))}"
            f"{nearest(str(value), TITLES)}"
        )
    values = _values(policy, value, scores)
    nodes = _nodes_of(program)
    if missing := [name for name in policy.layers if name not in nodes]:
        raise BitscapeError(
            f"program: no node of layer {missing[0]!r}{nearest(missing[0], nodes)}; "
            "export the network that the policy is of"
        )
    results = {node: {"value": number} for name, number in values.items() for node in nodes[name]}
    return {"name": TITLES[value], "results": results, "gradient": list(GRADIENT)}


def _values(policy: Policy, value: NodeValue, scores: ScoreTable | None) -> dict[str, float]:
    if value != "score":
        return {name: getattr(bits, value) for name, bits in policy.layers.items()}
    if scores is None:
        raise BitscapeError(
            "value='score' needs scores: those of the search, e.g. search(...).scores"
        )
    at_bits = {}
    for name, row in zip(scores.layers, scores.values.tolist(), strict=True):
        bits = policy.layers.get(name)
        if bits not in scores.candidates:
            raise BitscapeError(
                f"scores: none of layer {name!r} at {bits} bits; "
                "take those of the policy's own search"
            )
        at_bits[name] = row[scores.candidates.index(bits)]
    return at_bits


def _nodes_of(program: ExportedProgram) -> dict[str, list[str]]:
    """Module -> the nodes that it computes itself."""
    nodes: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            path, _kind = list(stack.values())[-1]
            nodes.setdefault(path, []).append(node.name)
    return nodes
