"""The simulated multiprocessor, and the models that run on it. So far there are the models."""
