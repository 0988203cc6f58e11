"""A network of static bits as a folder: `policy.json` and `model.safetensors`, without a policy where it is in float."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bitscape.folders import POLICY_FILE, WEIGHTS_FILE
from bitscape.models.find import save_weights
from bitscape.policy import Policy


def save_static(state: Mapping[str, Tensor], policy: Policy | None, folder: Path) -> None:
    """Write the state dict of a network and its policy into `folder`.

    Old weights are removed first and the new ones come last: weights are never seen beside the policy of another network.
    """
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    if policy is not None:
        policy.save(folder / POLICY_FILE)
    save_weights(state, folder / WEIGHTS_FILE)
