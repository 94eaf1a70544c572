"""Grammars are tried out in a process of their own, before they come into the one that serves.

A grammar may take llguidance minutes, all memory, or more stack than there is, which ends a process; here it
costs this process alone, and whoever sent it a second. Run as a module it is that process.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from typing import Any

from pagellm.engine.errors import EngineError, RequestError
from pagellm.engine.requests.structured import StructuredOutputs

# With the start of another process, for whom the one before has taken so long, less than a second.
_TRIAL_S = 0.5
_START_S = 60.0
_MEMORY_BYTES = 2 << 30
# Less than the stacks of the threads that compile what passes here.
_STACK_BYTES = 2 << 20
_LONGEST_MESSAGE = 300


class Trial:
    """The process, begun when it is needed, and again at once where it has been ended. Safe to use from
    several threads.

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
        self._connection: Connection | None = None
        self._is_ready = False
        self._owner = 0  # the process that began it: a fork of that begins one of its own

    def grammar_of(self, form: StructuredOutputs) -> str:
        """The grammar of a form, which llguidance has compiled there. Raises `RequestError`."""
        with self._lock:
            try:
                connection = self._started()
                connection.send_bytes(json.dumps(asdict(form)).encode())
                answer = connection.recv_bytes() if connection.poll(_TRIAL_S) else None
            except (EOFError, OSError):  # it has ended
                answer = b""
            except BaseException:
                self._end()
                raise
            if not answer:
                self._end()
                with suppress(OSError):
                    self._begin()
                why = "more memory or depth than it may have" if answer == b"" else f"more than {_TRIAL_S} s"
                raise RequestError(f"structured.{form.form}: found one that takes {why} to compile")
        grammar, error = json.loads(answer)
        if error is not None:
            raise RequestError(f"structured.{form.form}: {error}")
        return str(grammar)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()
            self._vocabulary.close()

    def _started(self) -> Connection:
        if self._owner != os.getpid():
            self._process = self._connection = None
        elif self._process is not None and self._process.poll() is not None:
            self._end()
        try:
            connection = self._connection or self._begin()
            self._is_ready = self._is_ready or (
                connection.poll(_START_S) and connection.recv_bytes() == b"ready"
            )
        except (EOFError, OSError):
            self._is_ready = False
        if not self._is_ready:
            self._end()
            raise EngineError("structured: the process that tries grammars does not start")
        return connection

    def _begin(self) -> Connection:
        """Begins the process, without waiting for it."""
        ours, theirs = Pipe()
        self._owner = os.getpid()
        self._connection, self._is_ready = ours, False
        with theirs:
            descriptors = theirs.fileno(), self._vocabulary.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        return ours

    def _end(self) -> None:
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        self._is_ready = False
        if connection is not None:
            connection.close()
        if process is not None and self._owner == os.getpid():
            process.kill()
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


def _serve(connection: Connection, vocabulary: int) -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from pagellm.engine.grammar.vocabulary import ll_tokenizer

    size = os.fstat(vocabulary).st_size  # others read it, too: the place in it is theirs
    hexes, special_ids, eos_ids = json.loads(os.pread(vocabulary, size, 0))
    tokens = list(map(bytes.fromhex, hexes))
    tokenizer = ll_tokenizer(tokens, special_ids, eos_ids, _encoder(tokens))
    connection.send_bytes(b"ready")
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(
                json.dumps(_compiled(tokenizer, json.loads(connection.recv_bytes()))).encode()
            )


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(Connection(int(sys.argv[1])), int(sys.argv[2])))
    thread.start()
    thread.join()
