"""What came of many runs: tables, one page to open in a browser, and pictures.

results.py     a sweep's results as rows, axes and curves; its tables
importance.py  how much each key decides, beyond chance
figures.py     interactive figures (plotly)
scales.py      what figures show, and in which range; looks.py, their colours
pictures.py    the same as PNG (matplotlib)
explore.py     what a reader of the page may choose: metric, axes, colours, filter
page.py        one self-contained HTML file
compare.py     any run folders side by side: means over seeds, pairs of one seed
compared.py    that as tables, a page and a picture
"""

from gpt_jax.report.page import write
from gpt_jax.report.results import summary, table, tables

__all__ = ["summary", "table", "tables", "write"]
