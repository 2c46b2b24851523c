"""Benchmarks: what a crash costs the crashed process, and what the collector costs its node, beside the peers.

Run by `python -m bench`, as root, on Linux. Everything is measured side by side in one run, in alternating rounds;
what is compared is ratios of medians, since machines differ.
"""
