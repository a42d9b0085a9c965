"""The example of docs/planning.md runs as printed."""

from imaml.planning import Forecast
from tests.pages import python, read


def test_the_page(capsys):
    [block] = python(read("docs/planning.md"))
    names = {}
    exec(block, names)
    forecast = names["forecast"]
    assert isinstance(forecast, Forecast) and forecast.memory == 20_000_000
    assert forecast.fits and not all(setting.fits for setting in forecast.settings)
    assert capsys.readouterr().out.strip() == str(forecast) and names["gradients"]
