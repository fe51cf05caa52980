"""Preference training whose reference policy follows the trained one."""

__all__: list[str] = []
