"""Formulas of papers on autograd's own operators, which the library's results are compared with."""

import torch


def fake_quantize(x, scale, grid, factor=1.0):
    """LSQ (Esser et al., Eq. 1-3) in float32; `factor` multiplies the gradient of the scale."""
    spacing = scale.detach()
    scale = spacing + (scale - spacing) * factor
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    ratio = wide / spacing
    ratio = ratio - ratio.detach() * ((scale - spacing) / spacing)
    code = torch.clamp(ratio + grid.zero_point, grid.qmin, grid.qmax)
    rounded = code + (code.round() - code).detach()
    return ((rounded - grid.zero_point) * scale).to(x.dtype)
