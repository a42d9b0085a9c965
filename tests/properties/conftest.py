"""What the tests of the engine need, these need too."""

from tests.engine.conftest import _import_forward_ad  # noqa: F401
