"""Commands, which stand beside what trains."""
