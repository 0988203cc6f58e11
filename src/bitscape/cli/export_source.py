"""What `bitscape export` writes: the network, quantized as the options say, its policy and the images of --calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bitscape as bs
from bitscape.cli.network import ImageSettings, calibration_and_held_out, load_network, quantize_network
from bitscape.cli.options import all_of, image_options, network_options, policy_options
from bitscape.cli.packed import packed_policy
from bitscape.cli.parsing import parse_repair
from bitscape.cli.paths import FILE, FOLDER
from bitscape.errors import BitscapeError
from bitscape.policy import WIDE_BITS, Policy
from bitscape.words import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitscape.verbs.export import ExportReport, Form

source_options = all_of(
    network_options,
    image_options,
    policy_options,
    click.option("--checkpoint", type=FOLDER, metavar="FOLDER", help="Instead: what `bitscape train --policy` left there."),
)
HELD_OUT = 256
"""Images of --calibration, at most, that set no range and that whole networks are compared on."""
packed_option = click.option("--packed", type=FILE, metavar="FILE", help="Instead: a packed file of this network.")


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """What the options name."""

    float_network: "nn.Module"
    network: "nn.Module"
    """Quantized."""
    policy: Policy
    images: "Tensor | None"
    """Of --calibration, normalized; they set ranges."""
    held_out: "Tensor | None"
    """Others of --calibration, HELD_OUT at most, which set no range."""

    @classmethod
    def of(cls, options: dict[str, Any], form: "Form") -> "ExportSource":
        """Load the network and quantize it. Raises BitscapeError, before that, for options that do not go together or are missing."""
        from bitscape.quant.storage import load_static
        from bitscape.runtimes.packages import check_packages

        policy_file, checkpoint, packed = options["policy_file"], options["checkpoint"], options.get("packed")
        if sum(option is not None for option in (policy_file, checkpoint, packed)) != 1:
            others = "--checkpoint or --packed" if "packed" in options else "or --checkpoint"
            raise BitscapeError(f"give --policy with --calibration, {others}; exactly one of them")
        if policy_file is not None and options["calibration"] is None:
            raise BitscapeError("--policy and --calibration go together: images set the policy's activation scales")
        if packed is not None and options["calibration"] is None:
            raise BitscapeError("--packed needs --calibration, which also tells the shape of the images")
        if form != "packed" and options["calibration"] is None:
            raise BitscapeError("--calibration is missing: images set the ranges of the tensors between the layers, and check the file")
        folder, seed = options["repair_folder"], options["seed"]
        repair = parse_repair(options["repair"], folder, has_policy=policy_file is not None)
        settings = ImageSettings.checked(options["input_size"], options["normalize"], options["calibration"])
        check_packages(form)
        policy = _policy(policy_file, packed, checkpoint)
        if form == "openvino":
            from bitscape.exporters.openvino.ir import refuse_wide

            refuse_wide((name for name, bits in policy.layers.items() if bits.activation == WIDE_BITS), "policy")
        network = load_network(options["model"], options["weights"], options["device"], seed)
        settings, images, held_out = settings.of_model(network), None, None
        if options["calibration"] is not None:
            count = options["calibration_images"]
            images, held_out = calibration_and_held_out(options["calibration"], count, settings, seed, network, further=HELD_OUT)
        if packed is not None:
            quantized = bs.load_packed(packed, network)
        elif checkpoint is not None:
            quantized = load_static(network, checkpoint)[0]
        else:
            assert images is not None
            quantized = quantize_network(network, policy, images, repair, folder, seed)
        return cls(float_network=network, network=quantized, policy=policy, images=images, held_out=held_out)

    def write(self, out: Path, form: "Form", **settings: Any) -> "ExportReport":
        """Write and check a file for a runtime, as `bitscape.export` does."""
        from bitscape.data.samples import Samples

        images, compared = Samples.of(self.required_images()), Samples.of(self.compared_images)
        count = max(len(images), len(compared))
        return bs.export(self.network, out, images, form=form, held_out=compared, count=count, **settings)

    def write_packed(self, out: Path) -> "ExportReport":
        """Write a packed file as `bitscape.export` does; where there are images, it is read back and compared."""
        count = 1 if self.images is None else len(self.images)
        return bs.export(
            self.network, out, self.images, form="packed", policy=self.policy, float_model=self.float_network, count=count
        )

    def required_images(self) -> "Tensor":
        """The images of --calibration, on the CPU: every form but the packed one has them."""
        assert self.images is not None
        return self.images.cpu()

    @property
    def compared_images(self) -> "Tensor":
        """The images on which whole networks are compared, on the CPU: held out, or those that set ranges where there are no others."""
        return self.required_images() if self.held_out is None or not len(self.held_out) else self.held_out.cpu()

    @property
    def compared_on(self) -> str:
        """What these images are, for people."""
        count = len(self.compared_images)
        if self.held_out is not None and len(self.held_out):
            return f"{counted(count, 'image')} of --calibration held out from setting ranges"
        return (
            f"the {count} images that set the ranges, for --calibration has no others: on new images the network before the export may "
            "agree less; hold some out with a smaller --calibration-images"
        )


def _policy(policy_file: Path | None, packed: Path | None, checkpoint: Path | None) -> Policy:
    """The policy of the network that is written; read before anything else is loaded."""
    from bitscape.quant.storage import static_policy

    if policy_file is not None:
        return Policy.load(policy_file)
    if packed is not None:
        return packed_policy(packed)
    assert checkpoint is not None
    saved = static_policy(checkpoint)
    if saved is None:
        raise BitscapeError(f"{checkpoint} holds a float network; train with --policy, or give --policy here")
    return saved
