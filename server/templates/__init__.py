"""The pages, as jinja2 templates. They are Python files because a Flower bundle carries no others of their kind."""

from server.templates import compare, page, plan, report

TEMPLATES = {"page": page.TEXT, "report": report.TEXT, "compare": compare.TEXT, "plan": plan.TEXT}
