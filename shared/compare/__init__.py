"""Many finished runs side by side: tables over papers, claims, devices, machines and commits, the leaderboard, ratios of benchmarks.

Reads ``results.json`` files alone and runs nothing, so nothing here can change a number; the cache therefore does not depend on it.
"""
