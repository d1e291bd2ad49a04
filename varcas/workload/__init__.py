"""The traffic: `schedule.py` says what is asked and when, `prompts.py` with which words, `driver.py` runs it.

`profiles/` holds the built-in workloads, `data/` reads your own, `arrivals.py` says when requests come. `locustfile.py`
is the child that sends them; `wire.py` is what goes over the wire.
"""
