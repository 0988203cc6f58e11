"""A network of static bits as a folder: `policy.json` and `model.safetensors`, without a policy where it is in float."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from bitscape.errors import BitscapeError
from bitscape.folders import DYNAMIC_FILE, POLICY_FILE, TIERS_FILE, WEIGHTS_FILE
from bitscape.models.find import load_weights, save_weights
from bitscape.models.modes import in_eval_mode
from bitscape.policy import Policy
from bitscape.quant.convert import with_quantizers


def save_static(state: Mapping[str, Tensor], policy: Policy | None, folder: Path) -> None:
    """Write the state dict of a network and its policy into `folder`.

    Old weights are removed first and the new ones come last: weights are never seen beside the policy of another network.
    """
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    if policy is not None:
        policy.save(folder / POLICY_FILE)
    save_weights(state, folder / WEIGHTS_FILE)


def load_static(model: nn.Module, folder: Path) -> tuple[nn.Module, Policy | None]:
    """Return the network of a folder, in eval mode, and its policy; None in float.

    Raises BitscapeError as `static_policy` does.
    """
    policy = static_policy(folder)
    network = model if policy is None else with_quantizers(model, policy)
    load_weights(network, folder / WEIGHTS_FILE)
    return in_eval_mode(network), policy


def static_policy(folder: Path) -> Policy | None:
    """Return the policy of a folder, None in float; no network is needed.

    Raises BitscapeError for a folder of a network whose bits depend on the image, and for one whose
    training has not ended.
    """
    if (folder / DYNAMIC_FILE).is_file():
        raise BitscapeError(
            f"{folder}: bits depend on the image; make static networks of it: bitscape tiers "
            f"--checkpoint {folder} ..."
        )
    if (folder / TIERS_FILE).is_file():
        raise BitscapeError(
            f"{folder}: it holds several networks; name one of them, e.g. {folder / 'tier1'}"
        )
    weights, saved = folder / WEIGHTS_FILE, folder / POLICY_FILE
    if not weights.is_file():
        raise BitscapeError(
            f"{folder}: no {WEIGHTS_FILE}; train to the end: bitscape train --out {folder} "
            "--resume ..."
        )
    return Policy.load(saved) if saved.is_file() else None
