"""Has griffe reword every docstring for the site, before it is parsed."""

import griffe
from wording import for_the_site


class Docstrings(griffe.Extension):
    """What griffe looks for in a module that it is given as an extension."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite that of an object."""
        if obj.docstring:
            obj.docstring.value = for_the_site(obj.docstring.value, obj.path)

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite that of a package, which is no member of another object."""
        self.on_object(obj=pkg)
