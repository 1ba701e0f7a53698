"""Under which names windows stand in event files; the sink that writes them and the tab that reads them share these."""

from __future__ import annotations

PLUGIN = "relu_doctor"
WINDOWS_TAG = "relu_doctor/windows"  # a string tensor (2,): header and status of a frame
UNITS_TAG = "relu_doctor/units"  # blobs, of one or more sites each: numbers of their units
MOST_BLOBS = 64  # of a window's numbers; neighbouring sites share one where there are more sites
