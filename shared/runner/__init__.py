"""The run: find papers, compose their config, run experiments with a cache, judge the claims, write the results."""
