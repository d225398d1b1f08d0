"""Ours beside its peers, in one command: `python -m benchmarks`. How and what it measures: `docs/benchmarks.md`.

children.py   the child that everybody keeps, and the log in which it notes its starts
processes.py  a daemon under measurement: its tree, memory, processor time, and its end with all that is left
drivers/      how each supervisor is configured, asked and stopped; the floors are among them
life.py       one life of one daemon, and what is measured in it
tasks.py      in-process tasks: ours beside bare nurseries
sweep.py      who is measured when: interleaved runs, and again what was noisy
report.py     medians, ratios, targets; the table and the JSON

queues.py has queues beside those of others (`python -m benchmarks.queues`): queue_peers.py, their servers, what is called.

Three commands of their own measure the libraries, each beside what does the same:

concurrency.py  tasks and channels: `python -m benchmarks.concurrency`
streaming.py    streams
policies.py     what retry, breaker and the others cost a call
beside.py       what they share: interleaved sweeps, ratios; alone.py: a process for each measurement
"""
