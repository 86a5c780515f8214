"""A front end shows where its time went."""

from __future__ import annotations

from hvd_localsgd import devices
from hvd_localsgd.core.settings import Settings
from hvd_localsgd.core.timing import Recorded
from hvd_localsgd.table import print_table


class Tabled(Recorded):
    """A front end whose ``totals`` can be shown."""

    settings: Settings

    def print_table(self) -> None:
        """On rank 0, when a training has ended: where the time of each rank went, in seconds and in percent.

        Raises:
            RuntimeError: none has ended.
        """
        if not self.totals:
            raise RuntimeError("There is nothing to show: no training has ended yet.")
        if devices.rank() == 0:
            print_table(self.totals, f"Local SGD, {self.settings.schedule}, {len(self.totals)} ranks")
