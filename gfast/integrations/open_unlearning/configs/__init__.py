"""YAML files for Hydra's search path."""
