"""Reports: one run folder, or several, as one self-contained page; needs no model, and reads only the folder.

:func:`read_runs` reads run folders into records; :func:`to_html` and :func:`write_page` show them.
"""

from regrow.reports.page import to_html, write_page, write_run_page
from regrow.reports.reading import ReportError, read_runs

__all__ = ["ReportError", "read_runs", "to_html", "write_page", "write_run_page"]
