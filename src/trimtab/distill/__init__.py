"""Distillation on what the student itself writes."""

__all__: list[str] = []
