"""DCAF: dynamic computation allocation for an online system (arXiv 2006.09684), beside SIM or any ranking system.

`policy.py` chooses each request's action at a price of compute, `multiplier.py` finds that price on a log, `value.py`
estimates gains before compute is spent, `controller.py` moves the limits of a request's cost with the system's load.
`replay.py` measures all this on a log against uniform and random cuts, `simulator.py` under traffic.
"""
