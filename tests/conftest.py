"""Settings of every test."""

from hypothesis import settings

# The same examples each time: a red run must be a change's fault. No deadline: the machine is shared.
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")
