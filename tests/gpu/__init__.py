"""What only a CUDA GPU can show: `python -m pytest -q tests/gpu`. A package, so that it has its own conftest.py."""
