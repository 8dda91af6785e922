"""What the structures do, in plain Python: short specifications to read, and the oracles of the property tests.

A model is never what a user gets. It runs one step at a time, so it needs no locks and no memory order; which
processor makes a call is an argument of the call.
"""
