"""Runs that are killed, stopped, starved and damaged at random, and must end as if nothing was.

``moments`` says where a run is, ``faults`` what happens to it, ``harness`` starts it, sees it to
its end and compares it with an undisturbed one.
"""
