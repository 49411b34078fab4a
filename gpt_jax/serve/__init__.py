"""Behind a port: a model that many ask at once, over HTTP and on a page.

batch.py    the rows on their way, and the programs that move them
engine.py   requests join and leave between decode steps
wire.py     what a client may ask, checked, and how it is answered
http.py     paths, limits, streams, numbers for Prometheus
server.py   opening runs, listening, leaving in good order
page/       the chat page: one HTML file, its script and its style
"""
