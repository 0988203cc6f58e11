"""What networks return, as tasks look at it: one tensor, or all floating-point ones in rows;
finite; in float32.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitscape.errors import BitscapeError
from bitscape.models.named_outputs import named_outputs
from bitscape.nested import tensors_in

CONSTANT = 1e-6
"""Outputs that spread less than this share of the largest are constant but for rounding."""
SHARES_APART = 1e-3
"""Sums of probabilities are 1 but for this: those in half precision are 5e-4 off at most."""


def only_tensor(output: object) -> object:
    """Return the tensor of a structure that holds a single one, anything else as it is."""
    if isinstance(output, Tensor):
        return output
    tensors = list(tensors_in(output))
    return tensors[0] if len(tensors) == 1 else output


def one_tensor(output: object, samples: int) -> Tensor:
    """Return one tensor (n, ...) in float32; a BitscapeError says what else came out."""
    output = only_tensor(output)
    if not isinstance(output, Tensor):
        raise BitscapeError(
            f"the model returns {type(output).__name__}; scores need one tensor (n, ...): wrap "
            "it, or use method local"
        )
    if output.ndim == 0 or len(output) != samples:
        raise BitscapeError(
            f"the model returns shape {tuple(output.shape)} for {samples} images; scores need (n, "
            "...), or use method local"
        )
    if not output.is_floating_point():
        raise BitscapeError(
            f"the model returns {output.dtype}, as of classes; scores need logits or other "
            "values: return those, or use method local"
        )
    return output.float()


def floating(output: object) -> dict[str, Tensor]:
    """Return the floating-point tensors among a network's outputs, by name; BitscapeError if there
    is none.
    """
    named = {
        name: tensor
        for name, tensor in named_outputs(output).items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not named:
        raise BitscapeError(
            "the model returns no floating-point tensor; scores need one: return it beside the "
            "others, or use method local"
        )
    return named


def rows_by_name(output: object, samples: int) -> dict[str, Tensor]:
    """Return every floating-point output as a row of float32 values for each sample."""
    return {name: _rows(name, tensor, samples) for name, tensor in floating(output).items()}


def _rows(name: str, tensor: Tensor, samples: int) -> Tensor:
    """Detectors may lay the cells of all images end to end."""
    if tensor.numel() % samples:
        raise BitscapeError(
            f"the model's output {name} has shape {tuple(tensor.shape)} for {samples} images, "
            "which is not so many values for each; "
            "use method local, which does not look at outputs"
        )
    return tensor.float().reshape(samples, -1)


def spreads_of(outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the standard deviation of each output, 1 for constant ones."""
    return {name: _spread(tensor) for name, tensor in outputs.items()}


def _spread(tensor: Tensor) -> float:
    values = tensor.detach().double()
    spread, largest = float(values.std(unbiased=False)), float(values.abs().max())
    return spread if spread > CONSTANT * largest else 1.0


def finite(outputs: Tensor) -> Tensor:
    """Return the outputs; a BitscapeError names the first sample whose are not finite."""
    broken = not_finite(outputs)
    if bool(broken.any()):
        raise BitscapeError(
            f"the model's outputs of image {int(broken.nonzero()[0])} are not finite; check the "
            "normalization of the images, "
            "or use method local, which does not look at them"
        )
    return outputs


def not_finite(outputs: Tensor) -> Tensor:
    """Return for each sample (n,) whether a value of its outputs (n, ...) is not finite."""
    return ~outputs.flatten(1).isfinite().all(1) if outputs.ndim > 1 else ~outputs.isfinite()


def per_sample(values: Tensor) -> Tensor:
    """Return the sum over each sample's values (n, ...), (n,)."""
    return values.reshape(len(values), math.prod(values.shape[1:])).sum(1)


def drawn_signs(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of that shape, drawn on the CPU so that every device draws the same.

    Samples come first: cut into batches, the same rows get the same signs.
    """
    return (torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1).to(like)


def are_probabilities(output: Tensor) -> bool:
    """Whether outputs (n, k, ...) are shares of k classes: none is negative, and each k add up to 1."""
    if output.ndim < 2 or output.shape[1] < 2 or not output.numel():
        return False
    apart = (output.detach().float().sum(1) - 1).abs().max()
    return bool(output.detach().min() >= 0) and bool(apart < SHARES_APART)


def as_logits_of(output: Tensor, *, probabilities: bool) -> Tensor:
    """Return the outputs, or their logarithm where they are probabilities."""
    return output.clamp(min=torch.finfo(output.dtype).tiny).log() if probabilities else output


def softmax_roots(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Columns of a square root of the softmax's Hessian, summed with random signs, (draws,
    *logits.shape); classes are dimension 1.

    diag(p) - p p^T = S S^T, where column c of S is sqrt(p_c) (e_c - p). With random signs r the
    outer product of S r with itself expects to S S^T. Every class keeps its sign over the draws,
    but for the signs of a column of a Hadamard matrix. Columns are dealt to the classes in order of
    their probability: the cross products of the most likely classes then cancel, of as many as
    there are draws if that is a power of two. As many draws as classes are exact.
    """
    chances = logits.detach().softmax(1)
    shape = (len(logits), logits.shape[1] + draws, *logits.shape[2:])
    of_class, of_draw = drawn_signs(shape, chances, generator).split([logits.shape[1], draws], 1)
    ranks = chances.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    hadamard = _hadamard(draws).to(chances)
    columns = hadamard[:draws, ranks % hadamard.shape[1]]  # (draws, n, k, ...)
    # A draw's own sign changes nothing within a softmax; it parts the positions of dense classes.
    roots: Tensor = chances.sqrt() * of_class * columns * of_draw.movedim(1, 0)[:, :, None]
    return roots - chances * roots.sum(2, keepdim=True)


def _hadamard(rows: int) -> Tensor:
    """The smallest of Sylvester's matrices with at least so many rows: orthogonal ones of signs."""
    matrix = torch.ones(1, 1)
    while len(matrix) < rows:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def softmax_divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    """Return the terms of KL(softmax(reference) || softmax(outputs)) over dimension 1, in the shape
    of both.
    """
    pair = outputs.log_softmax(1), reference.log_softmax(1)
    return functional.kl_div(*pair, log_target=True, reduction="none")
