"""The pages, as jinja2 templates. They are Python files because a Flower bundle carries no others of their kind."""

from server.templates import compare, page, plan, report, statement

TEMPLATES = {
    "page": page.TEXT,
    "report": report.TEXT,
    "statement": statement.TEXT,
    "compare": compare.TEXT,
    "plan": plan.TEXT,
}
