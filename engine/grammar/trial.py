"""Grammars are tried out in a process of their own, before they come into the one that serves.

A grammar may take llguidance minutes, all memory, or more stack than there is, which ends a process; here it
costs this process alone, and whoever sent it a second. Run as a module it is that process.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection, Pipe
from queue import LifoQueue
from typing import Any

from pagellm.engine.errors import EngineError, RequestError
from pagellm.engine.requests.structured import StructuredOutputs

_TRIAL_S = 0.6
_MOST_CHILDREN = 2  # one more than keeps others waiting; more would keep cores from whom they are to serve
_START_S = 60.0
_MEMORY_BYTES = 2 << 30
# Less than the stacks of the threads that compile what passes here.
_STACK_BYTES = 2 << 20
_LONGEST_MESSAGE = 300


class CostlyGrammarError(RequestError):
    """A grammar that takes more time, memory or depth to compile than it may have."""


class _Child:
    """One that tries grammars, one after the other; only its place is known while there is none.

    ask: gives one end of a connection to the process, which forks a child for it in the place of the last.
    """

    def __init__(self, ask: Callable[[Connection], None]) -> None:
        self._ask = ask
        self._connection: Connection | None = None
        self._is_ready = False  # it has said so
        self._owner = 0  # the process that it works for: a fork of that has one of its own

    def answer_to(self, form: StructuredOutputs) -> bytes | None:
        """What it says of a form; b"" if that has ended it, None if it takes too long: then comes another."""
        try:
            connection = self._connected()
            connection.send_bytes(json.dumps(asdict(form)).encode())
            answer = connection.recv_bytes() if connection.poll(_TRIAL_S) else None
        except (EOFError, OSError):  # it has ended
            answer = b""
        except BaseException:
            self.leave()
            raise
        if not answer:
            self._begin()
        return answer

    def leave(self) -> None:
        """Lets it end, which it does unless it is at work."""
        connection, self._connection = self._connection, None
        self._is_ready = False
        if connection is not None:
            connection.close()

    def _connected(self) -> Connection:
        connection = self._connection
        if connection is None or self._owner != os.getpid() or (self._is_ready and connection.poll()):
            self._begin()  # there is none, or none any more
        connection = self._connection
        try:
            if connection is not None and not self._is_ready:
                self._is_ready = connection.poll(_START_S) and connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            self._is_ready = False
        if connection is None or not self._is_ready:
            self.leave()
            raise EngineError("structured: the process that tries grammars does not start")
        return connection

    def _begin(self) -> None:
        """Asks for one, without waiting for it."""
        self.leave()
        self._owner = os.getpid()
        ours, theirs = Pipe()
        with theirs, suppress(OSError):
            self._ask(theirs)
            self._connection = ours


class Trial:
    """The process, begun when it is needed. Safe to use from several threads.

    It has the vocabulary and forks children, which do the work, each for one grammar at a time; where a
    grammar has cost one, the next is there within milliseconds, so that nobody waits for a process to start.

    tokens: the bytes of each token. special_ids, eos_ids: which of them are no text, and end one.
    """

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        # In a file without a name, so that a process can be begun without waiting until it reads.
        self._vocabulary = tempfile.TemporaryFile()  # noqa: SIM115
        vocabulary = [[token.hex() for token in tokens], list(special_ids), list(eos_ids)]
        self._vocabulary.write(json.dumps(vocabulary).encode())
        self._vocabulary.flush()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None  # by which it is asked for children
        self._owner = os.getpid()  # of the process; a fork of that begins one of its own
        self._children = [_Child(partial(self._ask_for_child, place)) for place in range(_MOST_CHILDREN)]
        self._idle: LifoQueue[_Child] = LifoQueue()  # the one that was at work last is the first to be again
        for child in self._children:
            self._idle.put(child)

    def grammar_of(self, form: StructuredOutputs) -> str:
        """The grammar of a form, which llguidance has compiled there.

        Raises `CostlyGrammarError`, and `RequestError` for other reasons.
        """
        child = self._idle.get()
        try:
            answer = child.answer_to(form)
        finally:
            self._idle.put(child)
        if not answer:
            why = "more memory or depth than it may have" if answer == b"" else f"more than {_TRIAL_S} s"
            raise CostlyGrammarError(f"structured.{form.form}: found one that takes {why} to compile")
        grammar, error = json.loads(answer)
        if error is not None:
            raise RequestError(f"structured.{form.form}: {error}")
        return str(grammar)

    def close(self) -> None:
        """Ends the process, and its children with it."""
        for child in self._children:
            child.leave()
        with self._lock:
            self._end()
            self._vocabulary.close()

    def _ask_for_child(self, place: int, connection: Connection) -> None:
        """Asks for a child at the other end of this, in the place of the one there may be."""
        with self._lock:
            if self._owner != os.getpid():
                self._process = self._control = None
            elif self._process is not None and self._process.poll() is not None:
                self._end()
            if self._process is None:
                self._begin()
            assert self._control is not None
            socket.send_fds(self._control, [bytes([place])], [connection.fileno()])

    def _begin(self) -> None:
        """Begins the process, without waiting for it."""
        self._owner = os.getpid()
        self._control, theirs = socket.socketpair()
        with theirs:
            descriptors = theirs.fileno(), self._vocabulary.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Nothing there computes on several threads, and what forks had better have one.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )

    def _end(self) -> None:
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
        self._control = None
        if process is not None and self._owner == os.getpid():
            process.wait()


def parser_limits() -> Any:
    """What llguidance may use for one grammar, and one mask."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def first_line(message: str) -> str:
    """An error of llguidance's without the grammar and what else it adds."""
    line = message.strip().partition("\n")[0]
    return "found one that no text has" if line.startswith("NoExtension") else line[:_LONGEST_MESSAGE]


def _compiled(tokenizer: Any, form: dict[str, Any]) -> tuple[str | None, str | None]:
    """A form's grammar, or why there is none."""
    from llguidance import LLMatcher

    from pagellm.engine.grammar.forms import to_grammar

    try:
        grammar = to_grammar(form)
    except (ValueError, RecursionError) as bad:
        return None, first_line(str(bad)) or "it cannot be read"
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return None, first_line(matcher.get_error())
    return grammar, None


def _encoder(tokens: Sequence[bytes]) -> Callable[[str], list[int]]:
    """Cuts a text into the longest tokens: the tokens of a tokenizer, near enough for a trial."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    longest = max(map(len, tokens), default=0)

    def encode(text: str) -> list[int]:
        data, at, found = text.encode(), 0, []
        while at < len(data):
            size = next((n for n in range(longest, 0, -1) if data[at : at + n] in ids), 0)
            found += [ids[data[at : at + size]]] if size else []
            at += size or 1
        return found

    return encode


def _fork_children(control: socket.socket, vocabulary: int) -> None:
    """Forks a child for each descriptor that comes, and ends the one before in its place; at last all end."""
    from pagellm.engine.grammar.vocabulary import ll_tokenizer

    size = os.fstat(vocabulary).st_size  # others read it, too: the place in it is theirs
    hexes, special_ids, eos_ids = json.loads(os.pread(vocabulary, size, 0))
    tokens = list(map(bytes.fromhex, hexes))
    tokenizer = ll_tokenizer(tokens, special_ids, eos_ids, _encoder(tokens))
    gc.freeze()  # memory that all have in common
    children: dict[bytes, int] = {}
    while True:
        place, descriptors, *_ = socket.recv_fds(control, 1, 1)
        for ended in [place] if place else list(children):
            if ended in children:
                child = children.pop(ended)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if not place:
            return
        children[place] = os.fork()
        if not children[place]:
            control.close()
            threading.stack_size(_STACK_BYTES)
            thread = threading.Thread(target=_serve, args=(Connection(descriptors[0]), tokenizer))
            thread.start()
            thread.join()
            os._exit(0)
        os.close(descriptors[0])


def _serve(connection: Connection, tokenizer: Any) -> None:
    """What a child does."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            connection.send_bytes(
                json.dumps(_compiled(tokenizer, json.loads(connection.recv_bytes()))).encode()
            )


if __name__ == "__main__":
    _fork_children(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
