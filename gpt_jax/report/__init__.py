"""What came of many runs: tables, one page to open in a browser, and pictures.

results.py   a sweep's results as rows, curves and the importance of its keys
figures.py   interactive figures (plotly)
pictures.py  the same as PNG (matplotlib)
page.py      one self-contained HTML file
compare.py   any run folders side by side; seeds become mean and standard error
"""

from gpt_jax.report.page import write
from gpt_jax.report.results import summary, table, tables

__all__ = ["summary", "table", "tables", "write"]
