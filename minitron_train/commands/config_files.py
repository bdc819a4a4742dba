"""Hydra's files of conf/, read with the old names of renamed keys replaced by the new ones."""

from collections.abc import Mapping

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from minitron_train.config.renamed import current_settings


def with_current_names(node: DictConfig, where: str | None, section: str = "") -> DictConfig:
    """One file's settings under the new names; what `current_settings` reports and raises."""
    settings = OmegaConf.to_container(node)
    assert isinstance(settings, Mapping)
    return OmegaConf.create(current_settings(settings, where, section))


class ConfigFiles(FileConfigSource):
    """Hydra's source of YAML files, for paths that begin with minitron://."""

    @staticmethod
    def scheme() -> str:
        return "minitron"

    def load_config(self, config_path: str) -> ConfigResult:
        """One file; its section is its package, by default its folder."""
        found = super().load_config(config_path)
        group = config_path.rpartition("/")[0].replace("/", ".")
        package = found.header.get("package") or "_group_"
        section = {"_group_": group, "_global_": ""}.get(package, package)
        if isinstance(found.config, DictConfig):
            found.config = with_current_names(found.config, f"{self.path}/{config_path}.yaml", section)
        return found


class ReadConfigFiles(SearchPathPlugin):
    """Let Hydra read conf/ through ConfigFiles."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Replace the scheme of the program's own folder."""
        for element in search_path.get_path():
            if element.provider == "main" and element.path:
                element.path = f"{ConfigFiles.scheme()}://{element.path.removeprefix('file://')}"


def register() -> None:
    """Tell Hydra; a second call changes nothing."""
    for plugin in (ConfigFiles, ReadConfigFiles):
        Plugins.instance().register(plugin)
