"""The chat traffic: `chat.py` says what is asked and when, `prompts.py` with which words, `driver.py` runs it.

`locustfile.py` is the child that sends it; `wire.py` is what goes over the wire.
"""
