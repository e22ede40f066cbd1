"""Measures every activation against torch on this machine: `python -m fastact.bench --help`."""
