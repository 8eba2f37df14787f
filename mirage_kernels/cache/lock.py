"""`CacheLock`: any number of threads read a cache, or one changes it; and no fork finds a cache half changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from weakref import WeakSet

from ..backends import settle_threads

_FORKED = -1  # in place of a writer: the process is a fork, and nobody has used the cache in it yet
_locks: WeakSet[CacheLock] = WeakSet()
_forking = threading.RLock()


class CacheLock:
    """Let threads read, ``with lock:``, or one of them write, ``with lock.exclusive():``.

    A reader enters itself and then looks for a writer; a writer enters itself and then looks for readers: one of them
    sees the other and waits. A reader whom nobody disturbs so takes no mutex. Readers that come while a thread writes,
    or waits to, are let in when it is done, before the next one writes. A thread may take again what it has, and one
    that writes may read; one that reads must not begin to write.
    """

    __slots__ = ("__weakref__", "_changed", "_readers", "_turn", "_waiting", "_writer")

    def __init__(self) -> None:
        self._readers: dict[int, int] = {}  # how often each thread has it
        self._writer: int | None = None  # the thread that writes, or waits for readers to leave
        self._unlock()
        _locks.add(self)
        settle_threads()

    def _unlock(self) -> None:
        self._turn = threading.RLock()  # of the writers
        self._changed = threading.Condition()  # of the three others, where somebody waits for them
        self._waiting: set[int] = set()  # readers that the writer lets in when it is done

    def __enter__(self) -> None:
        me = get_ident()
        depth = self._readers.get(me, 0)
        self._readers[me] = depth + 1
        if self._writer is not None and not depth and self._writer != me:
            self._wait_to_read(me)

    def __exit__(self, *exception: object) -> None:
        me = get_ident()
        depth = self._readers[me] - 1
        if depth:
            self._readers[me] = depth
            return
        del self._readers[me]
        if self._writer is not None:
            with self._changed:
                self._changed.notify_all()

    def _wait_to_read(self, me: int) -> None:
        settle_threads()
        with self._changed:
            if self._writer == _FORKED:
                self._writer = None
            if self._writer is None:
                return
            del self._readers[me]
            self._waiting.add(me)
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: me in self._readers)
            except BaseException:
                self._waiting.discard(me)
                self._readers.pop(me, None)
                raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until no other thread reads or writes, and let none in while the block runs."""
        me = get_ident()
        if self._writer == me:
            yield
            return
        settle_threads()
        with self._turn:
            self._writer = me
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._readers.keys() <= {me})
                yield
            finally:
                with self._changed:
                    self._writer = None
                    self._readers.update(dict.fromkeys(self._waiting, 1))
                    self._waiting.clear()
                    self._changed.notify_all()

    # Around a fork, which copies the memory but of all threads only the one that calls it.

    def before_fork(self) -> None:
        """Wait until no other thread writes, and let none begin."""
        self._turn.acquire()

    def after_fork(self, in_child: bool) -> None:
        """Let others write again; in the child, forget the threads that it does not have."""
        if not in_child:
            self._turn.release()
            return
        me = get_ident()
        self._unlock()
        self._readers = {me: self._readers[me]} if me in self._readers else {}
        if self._writer != me:
            self._writer = _FORKED


_held: list[CacheLock] = []


def _before_fork() -> None:
    _forking.acquire()
    for lock in list(_locks):
        lock.before_fork()
        _held.append(lock)


def _after_fork(in_child: bool) -> None:
    global _forking
    for lock in _held:
        lock.after_fork(in_child)
    _held.clear()
    if in_child:
        _forking = threading.RLock()
    else:
        _forking.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(False),
        after_in_child=lambda: _after_fork(True),
    )
