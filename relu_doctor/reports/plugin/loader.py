"""What TensorBoard imports when it starts: light, so that nothing of PyTorch is loaded before the tab is looked at."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.base_plugin import TBLoader

from relu_doctor.reports.plugin.names import PLUGIN


class ReLUDoctorLoader(TBLoader):  # type: ignore[misc]  # TensorBoard ships no types
    """Makes the plugin, and has TensorBoard keep every window."""

    def fix_flags(self, flags: Any) -> None:
        """Keep all records of this plugin, where the user has not said how many.

        Of a foreign plugin's records TensorBoard keeps 10 to 100 by default, picked at random.
        """
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(PLUGIN, 0)

    def load(self, context: Any) -> Any:
        """The plugin; None, so that TensorBoard goes on without the tab, where it has no data provider."""
        if context.data_provider is None:
            return None
        from relu_doctor.reports.plugin.backend import ReLUDoctorPlugin

        return ReLUDoctorPlugin(context)
