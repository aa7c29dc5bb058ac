"""Server of worlds over HTTP: `worldline serve`; the extra worldline[serve].

One process without torch answers requests and owns the queue and the store; each world runs in
worker processes. `records.py` has what they exchange.
"""
