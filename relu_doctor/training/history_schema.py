r"""The tables of a history, version 1: their names, columns and units, as a file's own ``.schema`` shows them.

A history is one SQLite file, ``relu_doctor.sqlite``, in a directory that may hold other things too; beside it lie
``relu_doctor.lock`` (empty; locked while a run writes) and, while a run writes or after it was killed, SQLite's own
``-wal`` and ``-shm``. Plain SQL and pandas read it:

    connection = sqlite3.connect("runs/exp1/relu_doctor.sqlite")
    timeline = pd.read_sql("SELECT * FROM timeline", connection)

Per-unit data are one row of ``units`` per window and site, one blob per column, little-endian, in the order of the
site's units; the table ``unit_columns`` says of each its numpy dtype, whether zlib has deflated it, and what it holds.
Words (status, mechanism, onset) are one byte a unit, spelled out by the table ``codes``:

    blob, = connection.execute("SELECT status FROM units WHERE window_id = 12 AND site_key = 1").fetchone()
    status = np.frombuffer(blob, "u1")

Text is stored as it is, but for lone surrogates, which become escapes (``\udc80``). NaN is stored as NULL.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from relu_doctor.training.windows import SITE_COLUMNS

SCHEMA_VERSION = 1
APPLICATION_ID = 0x52444831  # "RDH1", in the header of the file
FILE = "relu_doctor.sqlite"
LOCK = "relu_doctor.lock"

COUNTS = ("dead", "unproven", "silent", "rare", "dormant", "saturated", "non_finite", "unobserved", "active")
FRACTIONS = ("dead_fraction", "silent_fraction")
NUMBERS = ("loss", "grad_norm", "lr", "observed_steps", "observed_inputs")


@dataclass(frozen=True, slots=True)
class UnitColumn:
    """One column of per-unit data.

    Attributes:
        name: as in ``Diagnosis.units`` or, for ``carried``, in ``Window.units``.
        kind: ``word`` (a code of one byte), ``whole`` (int64) or ``real`` (float32).
        meaning: for the table ``unit_columns``.
        carried: comes from ``Window.units``.
    """

    name: str
    kind: str
    meaning: str
    carried: bool = False

    @property
    def dtype(self) -> str:
        """Of a stored value, in numpy's spelling."""
        return {"word": "u1", "whole": "<i8", "real": "<f4"}[self.kind]

    @property
    def deflated(self) -> bool:
        """Whether zlib has deflated the blob: whole numbers shrink to little, the others hardly."""
        return self.kind == "whole"


UNIT_DATA = (
    UnitColumn("status", "word", "dead, unproven, active, ...: see codes"),
    UnitColumn("mechanism", "word", "what holds a silent unit down: see codes"),
    UnitColumn("inputs", "whole", "inputs seen, those carried on included"),
    UnitColumn("inputs_fired", "whole", "inputs on which it fired"),
    UnitColumn("firing_rate", "real", "inputs_fired / inputs"),
    UnitColumn("firing_rate_upper", "real", "upper bound on the firing rate, simultaneous over all units"),
    UnitColumn("pre_max", "real", "largest pre-activation"),
    UnitColumn("pre_mean", "real", "mean pre-activation"),
    UnitColumn("margin", "real", "of a silent unit: standard deviations from pre_max to where it would fire"),
    UnitColumn("dormancy", "real", "mean output over that of its site"),
    UnitColumn("bias", "real", "its bias"),
    UnitColumn("weight_l2", "real", "norm of its incoming weights"),
    UnitColumn("onset", "word", "how it came to be dead or to fire again; empty for neither: see codes", carried=True),
    UnitColumn("onset_step", "whole", "global step of the onset; -1 for none", carried=True),
    UnitColumn("onset_confidence", "real", "of the onset", carried=True),
    UnitColumn("silent_since", "whole", "global step after which it was not seen to fire; -1 for none", carried=True),
    UnitColumn("silent_inputs", "whole", "inputs seen since then", carried=True),
    UnitColumn("reference_inputs", "whole", "inputs of the reference batches", carried=True),
    UnitColumn("reference_fired", "whole", "of those, how many fired it", carried=True),
)

_COUNT_COLUMNS = ",\n    ".join(f"{name} INTEGER" for name in COUNTS)
_FRACTION_COLUMNS = ",\n    ".join(f"{name} REAL" for name in FRACTIONS)
_NUMBER_COLUMNS = ",\n    ".join(f"{name} REAL" for name in NUMBERS)
_SITE_COLUMNS = ",\n    ".join(
    f"{name} {'INTEGER' if name in {'deaths', 'revivals'} else 'REAL'}" for name in SITE_COLUMNS
)
_UNIT_COLUMNS = ",\n    ".join(f"{column.name} BLOB" for column in UNIT_DATA)

TIMELINE = f"""SELECT
    windows.window_id, run_id, first_step, last_step, closed, superseded_by, site, site_id, site_windows.num_units,
    {", ".join(f"site_windows.{name}" for name in (*COUNTS, *FRACTIONS))},
    {", ".join(SITE_COLUMNS)}
    FROM windows JOIN site_windows USING (window_id) JOIN sites USING (site_key)"""

TABLES = (
    """CREATE TABLE meta (
    key TEXT PRIMARY KEY,  -- schema_version; created; writer: who writes or last wrote, JSON
    value TEXT
)""",
    """CREATE TABLE codes (
    kind TEXT,             -- column of units
    code INTEGER,          -- byte in its blob
    word TEXT,
    PRIMARY KEY (kind, code)
)""",
    """CREATE TABLE unit_columns (
    name TEXT PRIMARY KEY, -- column of units
    dtype TEXT,            -- numpy's spelling
    deflated INTEGER,      -- 1: zlib.decompress first
    meaning TEXT
)""",
    """CREATE TABLE runs (
    run_id INTEGER PRIMARY KEY,
    started REAL,          -- seconds since the epoch
    ended REAL,            -- NULL while it runs, and for ever if it was killed
    reason TEXT,           -- why it ended
    start_step INTEGER,    -- first global step of its own
    pid INTEGER,
    host TEXT,
    command TEXT,          -- JSON list; the environment is not kept
    versions TEXT,         -- JSON
    config TEXT,           -- thresholds, JSON
    details TEXT           -- JSON
)""",
    f"""CREATE TABLE windows (
    window_id INTEGER PRIMARY KEY,
    run_id INTEGER,
    "index" INTEGER,       -- place in its run, from 0
    first_step INTEGER,    -- global steps, inclusive
    last_step INTEGER,
    closed REAL,           -- seconds since the epoch
    superseded_by INTEGER, -- window_id of the window of a rewound run that took its place; NULL: live
    severity TEXT,
    num_units INTEGER,     -- that can die
    {_COUNT_COLUMNS},
    {_FRACTION_COLUMNS},
    num_inputs INTEGER,
    distinct_inputs INTEGER,
    inputs_needed INTEGER, -- silent on so many: dead
    {_NUMBER_COLUMNS},
    numbers TEXT           -- all that was told of the run, JSON
)""",
    """CREATE TABLE sites (
    site_key INTEGER PRIMARY KEY,
    site_id TEXT UNIQUE,   -- of what feeds it; the same in every run of one architecture
    site TEXT,             -- readable name
    rectifier TEXT,
    producer TEXT,
    readers TEXT,          -- JSON list
    num_units INTEGER
)""",
    f"""CREATE TABLE site_windows (
    window_id INTEGER,
    site_key INTEGER,
    place INTEGER,         -- in forward order
    num_units INTEGER,
    {_COUNT_COLUMNS},
    {_FRACTION_COLUMNS},
    {_SITE_COLUMNS},
    PRIMARY KEY (window_id, site_key)
) WITHOUT ROWID""",
    f"""CREATE TABLE units (
    window_id INTEGER,
    site_key INTEGER,
    num_units INTEGER,
    {_UNIT_COLUMNS},
    PRIMARY KEY (window_id, site_key)
)""",
    """CREATE TABLE findings (
    window_id INTEGER,
    place INTEGER,
    code TEXT,             -- relu-doctor explain CODE
    site TEXT,
    title TEXT,
    mechanism TEXT,
    evidence TEXT,
    advice TEXT,
    units BLOB,            -- unit indices, int64, deflated
    PRIMARY KEY (window_id, place)
)""",
    """CREATE TABLE alerts (
    alert_id INTEGER PRIMARY KEY,
    run_id INTEGER,
    window_id INTEGER,     -- NULL while its window is open
    superseded_by INTEGER, -- as of windows
    told REAL,             -- seconds since the epoch
    code TEXT,
    step INTEGER,          -- global
    site TEXT,
    message TEXT,
    evidence TEXT          -- JSON
)""",
    """CREATE TABLE diagnosis (
    window_id INTEGER,
    part INTEGER,
    content BLOB,          -- the whole latest Diagnosis: its parts joined are what Diagnosis.save writes (.safetensors)
    PRIMARY KEY (window_id, part)
)""",
    "CREATE VIEW live_windows AS SELECT * FROM windows WHERE superseded_by IS NULL ORDER BY last_step",
    f"CREATE VIEW timeline AS {TIMELINE} WHERE windows.superseded_by IS NULL ORDER BY last_step, place",
)


def stored_text(text: object) -> str:
    """Text that SQLite takes: lone surrogates become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def pack_whole(values: Any) -> bytes:
    """Whole numbers (int64, any shape) as a deflated blob."""
    return zlib.compress(np.asarray(values, dtype="<i8").tobytes(), 1)


def pack(column: UnitColumn, values: NDArray[Any]) -> bytes:
    """The blob of one site's values, (units,), of the column's dtype."""
    return zlib.compress(values.tobytes(), 1) if column.deflated else values.tobytes()


def unpack(blob: bytes, dtype: str, *, deflated: bool) -> NDArray[Any]:
    """The values of a blob, (units,).

    Raises:
        ValueError: the blob is damaged.
    """
    try:
        return np.frombuffer(zlib.decompress(blob) if deflated else blob, dtype)
    except zlib.error as error:
        raise ValueError(f"a blob is damaged ({error})") from error


def whole_numbers(values: pd.Series[Any]) -> NDArray[np.int64]:
    """A column as int64, -1 where it has none."""
    if values.dtype == np.int64:
        return np.asarray(values, dtype=np.int64)
    return np.asarray(values.astype("Float64").fillna(-1), dtype=np.int64)
