"""Where trials are kept: an Optuna study, in memory or in an SQLite file that a later run goes on from."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft.errors import MissingExtra, Problems, UsageError

STUDY = "weft"


@contextmanager
def optuna_quietly() -> Iterator[None]:
    """Optuna, silent but for errors."""
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search", "a search") from None
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def opened(path: Path | None, directions: Sequence[Any], told: Mapping[str, Any]) -> Iterator[Any]:
    """The study, in memory or in the file `path`, new or stored; refused where the stored one is not `told`'s."""
    import optuna

    storage: Any = None
    with contextlib.ExitStack() as stack:
        if path is not None:
            if not path.parent.is_dir():
                raise UsageError(f"{path.parent} is no folder; make it before the search")
            stack.enter_context(_alone(path))
            try:
                storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            except Exception as error:  # SQLAlchemy's and Optuna's, which have no common class
                said = str(error).splitlines()[0]
                raise UsageError(f"{path} is no stored search of this version ({said})") from None
            stack.callback(storage.remove_session)
            stack.callback(storage.engine.dispose)
        study = optuna.create_study(
            directions=list(directions), storage=storage,
            study_name=STUDY if storage else None, load_if_exists=False,
        ) if not _stored(storage) else optuna.load_study(study_name=STUDY, storage=storage)  # fmt: skip
        before = study.user_attrs.get("search")
        if before is None:
            study.set_user_attr("search", told)
        elif before != told:
            changed = [
                f"{key}: was {json.dumps(before.get(key))[:200]}, is {json.dumps(told.get(key))[:200]}"
                for key in sorted({*before, *told}) if before.get(key) != told.get(key)
            ]  # fmt: skip
            raise Problems(f"{path} holds another search; name a new file, or undo the change", changed)
        yield study


def _stored(storage: Any) -> bool:
    return storage is not None and any(s.study_name == STUDY for s in storage.get_all_studies())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep a second search off the same file; the lock goes with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another search is using {path}: wait for it, or name a new file") from None
        yield
