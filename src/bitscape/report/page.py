"""A report as one HTML file: sections in their order, charts inline, nothing fetched.

One script moves a slider; the page is complete without it, and its policy lets no other run.
"""

import base64
import hashlib
import re
from collections.abc import Callable

import jinja2
from markupsafe import Markup, escape

from bitscape.cost.layers import NetworkProfile
from bitscape.errors import printable_lines
from bitscape.report.analysis_section import error_by_layer
from bitscape.report.blocks import Missing, Section
from bitscape.report.front_section import pareto
from bitscape.report.headline import headline
from bitscape.report.heat_map import BLUES, shade, web_color
from bitscape.report.inputs import Inputs
from bitscape.report.layer_charts import SHADES
from bitscape.report.material import Material
from bitscape.report.policy_sections import bits_per_layer, layer_costs, sensitivity
from bitscape.report.reproduce_section import reproduce
from bitscape.report.result_section import asked
from bitscape.report.run_sections import corruptions, curves, deployed, mixed_or_uniform

SECTIONS: tuple[Callable[[Material], Section | Missing], ...] = (
    *(asked, bits_per_layer, layer_costs, pareto, mixed_or_uniform),
    *(sensitivity, error_by_layer, curves, corruptions, deployed, reproduce),
)
"""In the order of the page."""


def report_page(
    inputs: Inputs,
    *,
    network: NetworkProfile | None = None,
    model: str | None = None,
    command: str | None = None,
) -> str:
    """Write the page.

    Args:
        inputs: what `read_inputs` read.
        network: costs of the float network's layers (`measure`); without them, what only they
            tell is named as missing.
        model: what the network is called in the title; None: as the policies call it.
        command: that makes the page, to be shown.

    Raises:
        BitscapeError: a policy, score file or latency table that does not fit the network; the file
            is named.
    """
    material = Material(inputs=inputs, network=network, model=model, command=command)
    made = [section(material) for section in SECTIONS]
    sections = [each for each in made if isinstance(each, Section)]
    loader = jinja2.PackageLoader("bitscape.report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ticked"] = _ticked
    script = _script(loader, environment)
    page = environment.get_template("report.html").render(
        title=material.title,
        headline=headline(material),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=sections,
        slides=any(block.kind == "slider" for section in sections for block in section.blocks),
        missing=[each for each in made if isinstance(each, Missing)],
        shades=[web_color(shade(BLUES, at / (SHADES - 1))) for at in range(SHADES)],
    )
    return printable_lines(page)


def _script(loader: jinja2.BaseLoader, environment: jinja2.Environment) -> Markup:
    """The slider's script, as it stands in the page."""
    return Markup(loader.get_source(environment, "slider.js")[0].strip())


def _ticked(words: str) -> Markup:
    """Words whose `parts` between ticks are set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(words))))
