"""iiverl's core: configuration, data, algorithms, rollouts, rewards, and the loop that joins them.

Floors, from the ground up; a floor imports only floors below it: `config`, `algorithms`, `samples`, `data`,
`training`, `rollout`, `rewards`, `cluster`, `telemetry`, `controller`.
"""
