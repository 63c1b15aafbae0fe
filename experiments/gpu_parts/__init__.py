"""The parts of ``experiments/gpu_half_hour.py``, one a module, and what they have in common."""
