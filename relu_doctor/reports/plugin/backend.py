"""The plugin's routes: which run, window, site or unit is asked for, and how the answer travels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins.base_plugin import FrontendMetadata, TBPlugin
from werkzeug import wrappers

from relu_doctor.reports.plugin.names import PLUGIN

if TYPE_CHECKING:
    from relu_doctor.reports.plugin.records import Records, Run

WEB = Path(__file__).resolve().parent.parent / "web"
MOST_WINDOWS = 64  # of statuses in one answer
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_BINARY = "application/octet-stream"
_MOST_TEXT = 10_000  # characters of a run's name
_GZIP_LEVEL = 1  # statuses deflate well at once, and the tab is waiting

WSGIApp = Callable[[dict[str, Any], Any], Iterable[bytes]]


class BadRequestError(ValueError):
    """An argument is missing or is no number."""


class ReLUDoctorPlugin(TBPlugin):  # type: ignore[misc]  # TensorBoard ships no types
    """The tab *ReLU Doctor*.

    Args:
        context: TensorBoard's, with a data provider.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        self._records: Records | None = None

    def is_active(self) -> bool:
        """False: TensorBoard finds out by itself, from the data that are there."""
        return False

    def frontend_metadata(self) -> Any:
        """The tab's name, and the module that draws it."""
        return FrontendMetadata(es_module_path="/static/index.js", tab_name="ReLU Doctor")

    def get_plugin_apps(self) -> dict[str, WSGIApp]:
        """Each route with what answers it. Static files are routes of their own: a path leads to no other file."""
        apps: dict[str, Any] = {
            f"/{answer.__name__.removeprefix('_')}": self._app(answer)
            for answer in (
                self._runs,
                self._timeline,
                self._status,
                self._numbers,
                self._column,
                self._window,
                self._history,
            )
        }
        for path in sorted(WEB.iterdir()):
            if path.suffix in _TYPES:
                apps[f"/static/{path.name}"] = _static(path)
        return apps

    def _app(self, answer: Callable[[wrappers.Request], wrappers.Response]) -> WSGIApp:
        """A route; what was asked wrongly is answered by a sentence."""

        def respond(request: wrappers.Request) -> wrappers.Response:
            from relu_doctor.reports.packing import FrameError
            from relu_doctor.reports.plugin.records import NotFoundError

            try:
                if request.method not in {"GET", "HEAD"}:
                    return _json(request, {"error": f"expected GET, found {request.method[:20]}."}, 405)
                return answer(request)
            except BadRequestError as error:
                return _json(request, {"error": str(error)}, 400)
            except NotFoundError as error:
                return _json(request, {"error": str(error)}, 404)
            except FrameError as error:
                return _json(request, {"error": str(error)}, 500)

        return wrappers.Request.application(respond)

    @property
    def records(self) -> Records:
        """Made when the tab first asks: reading windows needs more than starting TensorBoard does."""
        if self._records is None:
            from relu_doctor.reports.plugin.records import Records

            self._records = Records(self._provider)
        return self._records

    def _run(self, request: wrappers.Request) -> Run:
        name = request.args.get("run")
        if name is None or len(name) > _MOST_TEXT:
            raise BadRequestError("expected the name of a run (?run=…), found none, or one that is too long.")
        return self.records.run(*_experiment(request), name)

    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        return _json(request, {"schema": 1, "runs": self.records.summaries(*_experiment(request))})

    def _timeline(self, request: wrappers.Request) -> wrappers.Response:
        from relu_doctor.reports.timelines import timeline

        run = self._run(request)
        windows = [kept.summary for kept in run.windows]
        return _json(request, timeline(run.name, windows, run.sites, run.unreadable))

    def _status(self, request: wrappers.Request) -> wrappers.Response:
        first, last = _whole(request, "first"), _whole(request, "last")
        run = self._run(request)
        if not first <= last < first + MOST_WINDOWS:
            raise BadRequestError(f"expected first ≤ last, at most {MOST_WINDOWS} windows, found {first} to {last}.")
        run.window(last)
        return _bytes(request, b"".join(run.status(index) for index in range(first, last + 1)))

    def _numbers(self, request: wrappers.Request) -> wrappers.Response:
        from relu_doctor.reports.plugin.answers import packed_columns

        index, site = _whole(request, "window"), _whole(request, "site")
        run = self._run(request)
        wanted = [(run.window(index), run.site(site)["site_id"])]
        (columns,) = self.records.numbers(_experiment(request)[0], run, wanted)
        return _bytes(request, b"" if columns is None else packed_columns(columns))

    def _column(self, request: wrappers.Request) -> wrappers.Response:
        from relu_doctor.reports.packing import COLUMNS
        from relu_doctor.reports.plugin.answers import whole_column

        index, name = _whole(request, "window"), request.args.get("column", "")
        if name not in dict(COLUMNS):
            raise BadRequestError(f"expected a column of {', '.join(dict(COLUMNS))}, found {name[:100]!r}.")
        run = self._run(request)
        kept = run.window(index)
        wanted = [(kept, site) for site, _ in kept.summary.sites]
        numbers = self.records.numbers(_experiment(request)[0], run, wanted, strict=False)
        return _bytes(request, whole_column(run, kept, name, numbers))

    def _window(self, request: wrappers.Request) -> wrappers.Response:
        from relu_doctor.reports.plugin.answers import window

        index = _whole(request, "window")
        return _json(request, window(self._run(request).window(index)))

    def _history(self, request: wrappers.Request) -> wrappers.Response:
        from relu_doctor.reports.plugin.answers import history, windows_of
        from relu_doctor.reports.plugin.records import NotFoundError

        site, unit = _whole(request, "site"), _whole(request, "unit")
        run = self._run(request)
        row = run.site(site)
        if unit >= row["num_units"]:
            raise NotFoundError(f"expected a unit from 0 to {row['num_units'] - 1}, found {unit}.")
        wanted = [(run.windows[place], row["site_id"]) for place in windows_of(run, site, unit)]
        numbers = self.records.numbers(_experiment(request)[0], run, wanted, strict=False)
        return _json(request, history(run, site, unit, numbers))


def _experiment(request: wrappers.Request) -> tuple[Any, str]:
    """TensorBoard's context of a request, and the experiment's id."""
    return plugin_util.context(request.environ), str(plugin_util.experiment_id(request.environ))


def _whole(request: wrappers.Request, name: str) -> int:
    """A whole number from 0 among the arguments."""
    text = request.args.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequestError(f"expected a whole number for {name}, found {text[:100]!r}.")
    return int(text)


def _json(request: wrappers.Request, value: Any, code: int = 200) -> wrappers.Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    # Bytes are handed over as they are; TensorBoard deflates text for clients that take it.
    found: wrappers.Response = http_util.Respond(request, text, "application/json; charset=utf-8", code=code)
    return found


def _bytes(request: wrappers.Request, value: bytes) -> wrappers.Response:
    """Deflated; where there is nothing, that is said."""
    packed = gzip.compress(value, _GZIP_LEVEL, mtime=0) if value else b""
    code, encoding = (200, "gzip") if value else (204, None)
    found: wrappers.Response = http_util.Respond(request, packed, _BINARY, code=code, content_encoding=encoding)
    return found


def _static(path: Path) -> WSGIApp:
    """One file of the front end, read when it is asked for."""

    def respond(request: wrappers.Request) -> wrappers.Response:
        found: wrappers.Response = http_util.Respond(request, path.read_bytes(), _TYPES[path.suffix])
        return found

    return wrappers.Request.application(respond)
