"""Behind a port: a model that many ask at once, over HTTP and on a page.

batch.py        the rows on their way, and the programs that move them
slots.py        their places, the shapes of programs; prefixes.py what prompts share
engine.py       requests join and leave between decode steps
fields.py       every field of a request: its kind, limits, default, meaning
messages.py     conversations; tools.py what a model may call
grammars.py     what a text must be, and which tokens go on within that
wire.py         what a client asks; flow.py what becomes of it; replies.py the answers
http.py         the paths; guard.py and connections.py what stands before them
server.py       opening runs, listening, leaving in good order
page/       the chat page: one HTML file, its script and its style
"""
