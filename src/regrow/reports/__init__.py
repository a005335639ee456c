"""Reports: one run folder, or several, as one self-contained page; needs no model, and reads only the folder.

:func:`summarise` makes one record; :func:`to_html`, :func:`write_page` and :func:`to_markdown` show it.
"""

from regrow.reports.page import to_html, to_markdown, write_page, write_run_page
from regrow.reports.reading import ReportError
from regrow.reports.summary import summarise

__all__ = ["ReportError", "summarise", "to_html", "to_markdown", "write_page", "write_run_page"]
