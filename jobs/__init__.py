"""The job modules that the shipped `supervisor.toml` names: plain functions, no decorators, no registry."""
