"""Histories that cannot be opened, read or written: one clear sentence each, and nothing is lost."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import pytest

from relu_doctor.errors import HistoryError, ReLUDoctorError
from relu_doctor.training.history import History
from relu_doctor.training.history_lock import is_locked
from relu_doctor.training.history_schema import FILE, LOCK
from tests.builders import make_diagnosis, site
from tests.training.made import PERIOD, scanned, window_of

resource = pytest.importorskip("resource", reason="needs POSIX: processes are forked and killed")

DEAD = scanned()


def begun(path, count: int = 2) -> Path:
    with History.open(path) as history:
        history.begin()
        for index in range(count):
            history.append(window_of(DEAD, index))
    return path


def killed(path: Path, count: int = 2) -> Path:
    """What a process leaves that was killed after some windows."""
    in_a_fork(lambda: _write_and_die(path, count))
    assert (path / f"{FILE}-wal").stat().st_size
    return path


def _write_and_die(path: Path, count: int) -> None:
    history = History.open(path)
    history.begin()
    for index in range(count):
        history.append(window_of(DEAD, index))
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(work) -> int:
    """Runs a function in a process of its own; its exit status, 0 where the function returned."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 all that is wrong there is told here
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def without_rights(work) -> None:
    """Runs a function as somebody who may write nothing that is protected, also where the tests run as root."""

    def do() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    assert in_a_fork(do) == 0


@pytest.fixture
def protected(tmp_path):
    """Makes a directory and what lies in it unwritable, readable for everybody."""
    changed: list[Path] = []

    def protect(path: Path) -> Path:
        for parent in path.parents:
            if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
                changed.append(parent)
        for each in (*path.iterdir(), path):
            each.chmod(0o555 if each.is_dir() else 0o444)
        return path

    yield protect
    for path in changed:
        path.chmod(0o700)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)


def sentence(work) -> str:
    """The one sentence of what is refused."""
    with pytest.raises(HistoryError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    assert isinstance(caught.value, OSError | ReLUDoctorError)
    return message


def test_nothing_there(tmp_path):
    """Reading makes nothing."""
    assert "found nothing at" in sentence(lambda: History.read(tmp_path / "no"))
    assert "found no relu_doctor.sqlite there" in sentence(lambda: History.read(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory(tmp_path):
    """Neither opened nor read, and left as it was."""
    path = tmp_path / "file"
    path.write_text("mine")
    assert "expected a directory for the history, found a file" in sentence(lambda: History.open(path))
    assert "expected the directory of a history, found a file" in sentence(lambda: History.read(path))
    assert "cannot write the history" in sentence(lambda: History.open(path / "below"))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", [FILE, LOCK])
def test_a_foreign_file_under_its_name(tmp_path, name):
    """Another kind of file is left as it was."""
    (tmp_path / name).write_text("something else " * 500)
    assert "another kind of file" in sentence(lambda: History.open(tmp_path))
    assert (tmp_path / name).read_text() == "something else " * 500


def test_a_foreign_database_under_its_name(tmp_path):
    """Another program's database is left as it was."""
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    before = (tmp_path / FILE).read_bytes()
    for work in (History.open, History.read):
        assert "another program's database" in sentence(lambda work=work: work(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before


def test_a_schema_from_the_future(tmp_path):
    """A newer history is neither read wrongly nor written to."""
    begun(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")
        connection.commit()
    before = (tmp_path / FILE).read_bytes()
    for work in (History.open, History.read):
        assert "expected a history of schema 1 or older" in sentence(lambda work=work: work(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("begin", [8, 50, 1000])
def test_a_damaged_file(tmp_path, begin):
    """Garbage in the file is called damage, and never a crash or a wrong table."""
    begun(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[begin:] = b"\xa5" * (len(content) - begin)
    (tmp_path / FILE).write_bytes(content)
    for work in (History.open, lambda path: History.read(path).timeline):
        message = sentence(lambda work=work: work(tmp_path))
        assert "damaged" in message or "another kind of file" in message or "another program" in message


def test_damaged_data_of_units_are_named(tmp_path):
    """A blob that does not inflate, or is of another length, is damage; the rest is read."""
    begun(tmp_path)
    for value in (b"garbage", None, b""):
        with closing(sqlite3.connect(tmp_path / FILE)) as connection:
            connection.execute("UPDATE units SET inputs = ?, status = x'0101' WHERE window_id = 2", [value])
            connection.execute("UPDATE diagnosis SET content = x'00'")
            connection.commit()
        reader = History.read(tmp_path)
        assert "is damaged" in sentence(reader.units)
        assert "damaged" in sentence(lambda reader=reader: reader.latest)
        assert len(reader.units(1)) == 13
        assert len(reader.windows) == 2


def test_an_unknown_window(tmp_path):
    """A window that is not there is named."""
    begun(tmp_path)
    assert "found 7" in sentence(lambda: History.read(tmp_path).units(7))


def test_a_file_that_a_process_left_empty(tmp_path):
    """Killed before the tables were made: the next run makes them, a reader says that nothing was begun."""
    (tmp_path / FILE).touch()
    assert "never begun" in sentence(lambda: History.read(tmp_path))
    begun(tmp_path)
    assert len(History.read(tmp_path).windows) == 2


def test_a_history_before_its_first_window(tmp_path):
    """Opened, begun, no window: empty tables and no diagnosis, whatever the state."""
    with History.open(tmp_path) as history:
        reader = History.read(tmp_path)
        assert reader.state.state == "running"
        history.begin()
        assert (reader.latest, len(reader.windows), len(reader.units()), len(reader.timeline)) == (None, 0, 0, 0)
    assert reader.state.state == "ended"


def test_two_writers_are_refused(tmp_path):
    """The second is told who holds it, in another process and in the same one; the first is not disturbed."""
    history = History.open(tmp_path)
    history.begin()
    message = sentence(lambda: History.open(tmp_path, patience=0))
    assert f"is being written by this process {os.getpid()} on " in message
    code = f"from relu_doctor.training.history import History; History.open({str(tmp_path)!r}, patience=0)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"is being written by process {os.getpid()} on " in other.stderr
    assert "wait for it to end, or give another directory" in other.stderr
    assert history.append(window_of(DEAD)) == 1
    history.close()
    begun(tmp_path / "again")
    with History.open(tmp_path):
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    """After SIGKILL the next run opens the history at once, though a forked worker of the killed one lives on."""
    reading, writing = os.pipe()

    def write() -> None:
        history = History.open(tmp_path)
        history.begin()
        history.append(window_of(DEAD))
        worker = os.fork()
        if worker == 0:
            os.close(writing)
            signal.pause()
        os.write(writing, f"{worker}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_a_fork(write))
    worker = int(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    try:
        assert not is_locked(tmp_path)
        assert History.read(tmp_path).state.state == "stopped"
        with History.open(tmp_path, patience=0) as history:
            history.begin(start_step=PERIOD)
            history.append(window_of(DEAD, 1))
    finally:
        os.kill(worker, signal.SIGKILL)
    reader = History.read(tmp_path)
    assert reader.windows["first_step"].tolist() == [0, 10]
    assert reader.runs["ended"].isna().tolist() == [True, False]


def test_a_fork_does_not_write(tmp_path):
    """A forked child is refused, and its closing and its end leave the parent's history alone."""
    with History.open(tmp_path) as history:
        history.begin()

        def use() -> None:
            assert "cannot be used in its fork" in sentence(lambda: history.append(window_of(DEAD)))
            history.close()
            history._connection.close()  # as at the end of a child's interpreter
            history._lock.release()

        assert in_a_fork(use) == 0
        assert is_locked(tmp_path)
        assert "is being written by" in sentence(lambda: History.open(tmp_path, patience=0))
        history.append(window_of(DEAD))
        assert (tmp_path / f"{FILE}-wal").exists()
    assert len(History.read(tmp_path).windows) == 1


def test_a_writer_that_lost_its_lock_notices(tmp_path):
    """POSIX drops a process's locks when it copies the files; should another write then, the first one stops."""
    first = History.open(tmp_path)
    first.begin()
    first._lock.release()
    second = History.open(tmp_path)
    second.begin()
    assert "was taken over by another process" in sentence(lambda: first.append(window_of(DEAD)))
    second.append(window_of(DEAD))
    first.close()
    second.append(window_of(DEAD, 1))
    second.close()
    assert len(History.read(tmp_path).windows) == 2


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_store_that_vanishes_is_noticed(tmp_path, how):
    """What would go into a deleted file is not called kept."""
    history = History.open(tmp_path / "run")
    history.begin()
    history.append(window_of(DEAD))
    if how == "removed":
        shutil.rmtree(tmp_path / "run")
    else:
        (tmp_path / "run" / FILE).rename(tmp_path / "old")
        (tmp_path / "run" / FILE).touch()
    assert "was removed or replaced" in sentence(lambda: history.append(window_of(DEAD, 1)))
    history.close()


def test_a_closed_history_is_closed(tmp_path):
    """Closing twice is as good as once; then nothing is written."""
    history = History.open(tmp_path)
    history.begin()
    history.close()
    history.close()
    assert "is closed" in sentence(lambda: history.append(window_of(DEAD)))
    assert History.read(tmp_path).runs["reason"].tolist() == ["closed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, FILE]


def test_forgetting_to_close_is_told(tmp_path):
    """A ResourceWarning, and it is closed all the same."""
    forgotten = [History.open(tmp_path)]
    forgotten[0].begin()
    with pytest.warns(ResourceWarning, match="was not closed"):
        forgotten.clear()
    gc.collect()
    assert not is_locked(tmp_path)


def test_an_end_is_noted_once(tmp_path):
    """The first reason stays; a run after it has its own."""
    with History.open(tmp_path) as history:
        history.begin()
        history.end("early stop")
        history.end("again")
        history.begin()
        history.begin()
    assert History.read(tmp_path).runs["reason"].tolist() == ["early stop", "another run began", "finished"]


def test_an_unwritable_directory(tmp_path, protected):
    """One sentence, and nothing is left behind."""
    protected(tmp_path)

    def use() -> None:
        for path in (tmp_path, tmp_path / "run"):
            assert "cannot write the history" in sentence(lambda path=path: History.open(path))

    without_rights(use)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["ended", "killed", "killed, without the log's index"])
def test_it_is_read_where_nothing_may_be_written(tmp_path, protected, left):
    """Also with a log that a killed run left, which SQLite itself refuses there: everything committed is seen."""
    path = tmp_path / "run"
    begun(path) if left == "ended" else killed(path)
    if "without" in left:
        (path / f"{FILE}-shm").unlink()
    before = {each.name: each.stat().st_mtime_ns for each in path.iterdir()}
    protected(path)

    def use() -> None:
        reader = History.read(path)
        assert reader.windows["first_step"].tolist() == [0, 10]
        assert len(reader.units()) == 13
        assert reader.latest.summary["dead"] == DEAD.summary["dead"]
        assert reader.state.state == ("ended" if left == "ended" else "stopped")

    without_rights(use)
    assert {each.name: each.stat().st_mtime_ns for each in path.iterdir()} == before


def test_a_running_history_is_read_by_one_who_may_not_write(tmp_path, protected):
    """Another user looks at a run that goes on."""
    path = tmp_path / "run"
    with History.open(path) as history:
        history.begin()
        history.append(window_of(DEAD))
        protected(path)

        def use() -> None:
            reader = History.read(path)
            assert len(reader.windows) == 1
            assert reader.state.state == "running"

        without_rights(use)
        history.append(window_of(DEAD, 1))
    assert len(History.read(path).windows) == 2


def test_an_unfinished_fold_is_rolled_back_in_a_copy(tmp_path):
    """Killed while SQLite's older journal was in use, as in the moments of closing: readers see what was committed."""
    begun(tmp_path)

    def spoil() -> None:
        connection = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE windows SET first_step = 77")
        connection.execute("UPDATE units SET status = zeroblob(20000)")
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_a_fork(spoil))
    assert (tmp_path / f"{FILE}-journal").stat().st_size
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reader = History.read(tmp_path)
    assert reader.windows["first_step"].tolist() == [0, 10]
    assert reader.units()["status"].tolist() == DEAD.units["status"].tolist()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with History.open(tmp_path) as history:
        history.begin(start_step=2 * PERIOD)
    assert len(reader.windows) == 2


def test_reading_leaves_an_ended_history_as_it_was(tmp_path):
    """Not a byte and not a file is changed."""
    begun(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reader = History.read(tmp_path)
    assert len(reader.timeline) == 4
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_loses_that_window_alone(tmp_path):
    """The store stays open and consistent, and takes later windows once there is room."""
    with History.open(tmp_path) as history:
        history.begin()
        history.append(window_of(DEAD))
        pages = history._connection.execute("PRAGMA page_count").fetchone()[0]
        history._connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()
        large = window_of(make_diagnosis(site("large", active=2000)), 1)
        assert "its disk is full" in sentence(lambda: history.append(large))
        assert len(History.read(tmp_path).windows) == 1
        history._connection.execute("PRAGMA max_page_count = 1000000").fetchone()
        history.append(window_of(DEAD, 2))
    reader = History.read(tmp_path)
    assert reader.windows["first_step"].tolist() == [0, 20]
    assert all(len(frame) == 13 for frame in reader.unit_frames())


def test_a_file_size_limit_loses_windows_and_not_the_run(tmp_path):
    """A real refusal of the system (EFBIG): every window is whole or not there, and the process goes on."""

    def use() -> None:
        with History.open(tmp_path) as history:
            history.begin()
            limit = (tmp_path / f"{FILE}-wal").stat().st_size + 200_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            results, told = [], set()
            for index in range(8):
                try:
                    results.append(bool(history.append(window_of(DEAD, index))))
                except HistoryError as error:
                    told.add(str(error).split(": ")[1])
                    results.append(False)
            assert {message.split(" (")[0] for message in told} == {"its disk is full, limited or failing"}
            assert results[0]
            assert not results[-1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            history.append(window_of(DEAD, 8))
        kept = [index for index, kept in enumerate(results) if kept]
        assert [step // PERIOD for step in History.read(tmp_path).windows["first_step"]] == [*kept, 8]

    assert in_a_fork(use) == 0


def _has_tables(path: Path) -> bool:
    with closing(sqlite3.connect(path / FILE)) as connection:
        return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def test_a_log_cut_anywhere_leaves_whole_windows(tmp_path):
    """What a machine without power may leave of a log that was not yet settled: a prefix, or garbage at its end."""
    killed(tmp_path / "run", 4)
    log = (tmp_path / "run" / f"{FILE}-wal").read_bytes()
    seen = set()
    for place in range(24):
        copy = tmp_path / str(place)
        copy.mkdir()
        shutil.copyfile(tmp_path / "run" / FILE, copy / FILE)
        size = len(log) * place // 24
        tail = b"\xa5" * 5000 if place % 2 else b""
        (copy / f"{FILE}-wal").write_bytes(log[:size] + tail)
        if not _has_tables(copy):  # cut before the tables
            assert "never begun" in sentence(lambda copy=copy: History.read(copy))
            continue
        reader = History.read(copy)
        count = len(reader.windows)
        seen.add(count)
        assert reader.windows["first_step"].tolist() == [10 * index for index in range(count)]
        assert all(len(frame) == 13 for frame in reader.unit_frames())
        assert (reader.latest is None) == (count == 0)
    assert seen >= {1, 2, 3}


def test_a_commit_waits_for_the_disk(tmp_path):
    """The settings by which a committed window survives the loss of power."""
    with History.open(tmp_path) as history:
        assert history._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert history._connection.execute("PRAGMA synchronous").fetchone() == (3,)


def test_opening_warns_of_nothing(tmp_path):
    """A first run, a second and their reading are silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(tmp_path)
        with History.open(tmp_path) as history:
            history.begin(start_step=2 * PERIOD)
        assert len(History.read(tmp_path).runs) == 2
