"""Maps the top-level folders conf/ and recipes/ into the wheel, so that an installed package finds them."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSettings(build_py):
    """Copies conf/ and recipes/ beside the modules; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("conf", "recipes"):
            for source in Path(folder).rglob("*.*"):
                target = Path(self.build_lib, "minitron_train", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithSettings})
