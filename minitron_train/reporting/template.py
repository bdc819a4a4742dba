"""The templates of the report, its pictures and the model card."""

import jinja2


def template(name: str) -> jinja2.Template:
    """Load one file of templates/. Text is escaped for HTML and SVG; a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minitron_train.reporting", "templates"),
        autoescape=not name.endswith(".md.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
