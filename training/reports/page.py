"""A report as one HTML page that fetches nothing."""

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined

from training.evaluation.report import Report
from training.reports.drawings import as_svg, drawings
from training.reports.summary import estimate, sections
from training.reports.table import cells


def report_page(report: Report) -> str:
    """Returns the page. Every string of the report stands in it as text, never as HTML."""
    environment = Environment(
        loader=PackageLoader("training.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = [
        (section.title, [(line, *cells(estimate(report, line.path))) for line in section.lines])
        for section in sections(report)
    ]
    # As an image the drawing's text cannot become part of the page either.
    images = {
        caption: "data:image/svg+xml;base64," + b64encode(as_svg(figure)).decode()
        for caption, figure in drawings(report).items()
    }
    return environment.get_template("report.html.jinja").render(
        report=report, tables=tables, images=images
    )
