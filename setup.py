"""Reads everything from settings.ini, so that each fact about the package stands in one place."""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
home, raw = f"{cfg['git_url']}/blob/{cfg['branch']}/", f"{cfg['git_url']}/raw/{cfg['branch']}/"
readme = (here / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"(!\[[^\]]*\]\()(?=nbs/)", rf"\1{raw}", readme)  # outside the repository a relative link leads nowhere
readme = re.sub(r"(\]\()(?=nbs/)", rf"\1{home}", readme)
minimum = tuple(int(n) for n in cfg["min_python"].split("."))


class WithResults(build_py):
    """A wheel brings the recorded runs, which notebooks show: in Colab there is no repository."""

    def run(self):
        super().run()
        if not self.editable_mode:
            there = Path(self.build_lib) / cfg["lib_name"] / "_results"
            there.mkdir(parents=True, exist_ok=True)
            for path in (here / "results").glob("*.json*"):
                shutil.copy2(path, there)


setup(
    cmdclass={"build_py": WithResults},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"]},
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Natural Language :: " + cfg["language"],
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *(f"Programming Language :: Python :: {minimum[0]}.{minor}" for minor in range(minimum[1], 15)),
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("audio", "attacks", "live", "segmentation", "text", "brainscore", "dev")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split("\n"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
