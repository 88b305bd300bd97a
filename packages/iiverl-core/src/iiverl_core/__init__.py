"""iiverl's core: configuration, data, algorithms, rollouts, rewards, and the loop that joins them.

Its packages are layers: each imports only those below it. `docs/architecture.md` lists them.
"""
