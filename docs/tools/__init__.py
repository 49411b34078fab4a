"""What is made of the pages: notebooks (notebooks.py) and a site (site.py)."""
