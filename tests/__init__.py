"""Tests, which mirror the rooms of the package."""

from tests import typecheck as typecheck
