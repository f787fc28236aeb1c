"""Fault injection: runs are disturbed at random and must end like an undisturbed one.

``moments`` detects where a run is, ``faults`` disturbs it, ``harness`` starts it, waits for
its end and compares it with an undisturbed one.
"""
