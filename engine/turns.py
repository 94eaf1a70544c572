"""One call at a time: what lets several threads share an engine.

Calls that change an engine run one after the other, whichever threads make them, and none of them begins in
the midst of another one of the same thread. Knows threads and processes; what the calls do is the engine's
business.

An exception may come from outside at any moment: Ctrl-C, a signal's handler. CPython lets none in between the
moment in which a `with` takes a lock and the block that gives it back; so each lock here is held by a `with`,
and who owns it is asked of the lock itself.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import CodeType, FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakSet

from pagellm.engine.errors import EngineError

# Who waits for another thread's call looks again after so many seconds whether it still goes on, so often.
_LOOK_EVERY_S, _MOST_LOOKS = 0.5, 20


_codes_of_calls: set[CodeType] = set()


class Turns:
    """Who may call an engine now.

    refusal: why nobody may any more. not_after_fork: why a forked process may not, if that is so.
    """

    def __init__(self, not_after_fork: str | None = None) -> None:
        self.refusal: str | None = None
        self._not_after_fork = not_after_fork
        # Whoever waits for the lock holds the entrance, where a thread that takes step after step waits, too.
        self.entrance: Any = threading.RLock()
        self.lock: Any = threading.RLock()
        self.caller: int | None = None  # the thread whose call goes on
        self._end_of_call = _taken_lock()  # given back when the call that goes on has ended
        _all_turns.add(self)

    @property
    def is_nested(self) -> bool:
        """Whether this is asked in the midst of a call of this very thread.

        If not, its locks are not this thread's. A debugger can raise an exception at a `with` that is just
        about to give its lock back; what was left so is given back here.
        """
        if not (self.lock._is_owned() or self.entrance._is_owned()):
            return False
        frame: FrameType | None = sys._getframe(2)  # the one that asks may be a call that is to begin
        while frame is not None:
            if frame.f_code in _codes_of_calls and frame.f_locals["owner"].turns is self:
                return True
            frame = frame.f_back
        for lock in (self.lock, self.entrance):
            while lock._is_owned():
                lock.release()
        return False

    def end(self) -> None:
        """Wakes those that wait for the end of the call that `caller` made."""
        ended, self._end_of_call = self._end_of_call, _taken_lock()
        ended.release()

    def wait(self) -> bool:
        """Waits for the end of a call of another thread; False if none goes on."""
        for _ in range(_MOST_LOOKS):
            end_of_call = self._end_of_call  # looked at first, because it is replaced last
            if self.caller in (None, threading.get_ident()):
                return False
            if end_of_call.acquire(timeout=_LOOK_EVERY_S):
                end_of_call.release()  # for the next one that waits
                return True
        return False

    def after_fork(self) -> None:
        """In a forked process, which has this thread alone: nobody may call if another one was in a call."""
        if not self.lock.acquire(blocking=False):
            self.lock, self.caller = threading.RLock(), None
            self.refusal = self.refusal or "was in use by another thread when this process was forked"
        else:
            self.lock.release()
            self.refusal = self.refusal or self._not_after_fork
        self.entrance, self._end_of_call = threading.RLock(), _taken_lock()


class TakesTurns(Protocol):
    """What has exclusive calls: restore() is called before each, and after one that raised."""

    turns: Turns

    def restore(self) -> None:
        """Brings itself into a state from which a call can begin."""


_Self = TypeVar("_Self", bound=TakesTurns)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Call = Callable[Concatenate[_Self, _Arguments], _Result]


def exclusive(call: _Call[_Self, _Arguments, _Result]) -> _Call[_Self, _Arguments, _Result]:
    """Makes a method a call that runs while no other one does.

    Raises `EngineError` in the midst of another call of the same thread, before anything is done.
    """
    return _in_turn(call, last=False)


def exclusive_last(call: _Call[_Self, _Arguments, _Result]) -> _Call[_Self, _Arguments, _Result]:
    """As `exclusive`, for a call that a thread makes again and again: all others that wait go before it."""
    return _in_turn(call, last=True)


def _in_turn(call: _Call[_Self, _Arguments, _Result], last: bool) -> _Call[_Self, _Arguments, _Result]:
    @wraps(call)
    def alone(owner: _Self, /, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        turns = owner.turns
        if turns.is_nested:
            raise EngineError(
                f"{call.__name__.lstrip('_')}: found a call in the midst of another one of the same engine, "
                "as by a policy or a handler of signals, expected it afterwards"
            )
        if last:
            with turns.entrance:
                pass
            with turns.lock:
                return _run(owner, call, *arguments, **named)
        with turns.entrance, turns.lock:
            return _run(owner, call, *arguments, **named)

    _codes_of_calls.add(alone.__code__)  # type: ignore[attr-defined]
    return alone


def _run(
    owner: _Self,
    call: _Call[_Self, _Arguments, _Result],
    *arguments: _Arguments.args,
    **named: _Arguments.kwargs,
) -> _Result:
    try:
        owner.turns.caller = threading.get_ident()
        owner.restore()
        return call(owner, *arguments, **named)
    except BaseException:
        owner.restore()
        raise
    finally:
        owner.turns.caller = None
        owner.turns.end()


def _taken_lock() -> Any:
    lock = threading.Lock()
    lock.acquire()
    return lock


_all_turns: "WeakSet[Turns]" = WeakSet()


def _after_fork() -> None:
    for turns in list(_all_turns):
        turns.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
