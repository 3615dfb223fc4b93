"""A page on paper: report.pdf through weasyprint, which is an optional extra."""

import logging
import re
from pathlib import Path

from privacy.durable import write_atomic
from privacy.refused import Refused

_MISSING = "a PDF needs weasyprint: pip install '.[pdf]' (and the system's Pango library), or print report.html"


def write(path: Path, html: str) -> Path:
    """The page as PDF, atomically. Raises Refused where weasyprint or its libraries are not installed."""
    try:
        import weasyprint
    except ImportError:
        raise Refused(_MISSING) from None
    except OSError as error:  # the package is there, Pango is not
        raise Refused(f"{_MISSING}: {str(error).splitlines()[0]}") from None
    logging.getLogger("weasyprint").setLevel(logging.ERROR)  # it names every rule for screens that paper has no use for
    content = weasyprint.HTML(string=plain(html), url_fetcher=_nothing).write_pdf()
    write_atomic(path, content)
    return path


def plain(html: str) -> str:
    """The page with its colours put in by name: weasyprint reads CSS variables in style sheets, not inside of SVG."""
    root = html.partition(":root {")[2].partition("}")[0]
    colours = dict(re.findall(r"--([\w-]+): ([^;]+);", root))
    return re.sub(r"var\(--([\w-]+)\)", lambda found: colours.get(found[1], found[0]), html)


def _nothing(url: str, *_: object, **__: object) -> dict[str, str]:
    raise ValueError(f"a report fetches nothing, not {url}")
