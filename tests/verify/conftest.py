from tests.engine.conftest import _import_forward_ad as _import_forward_ad
