"""The grammars of requests: compiled beside the loop, then one matcher for each that runs."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.batcher import Waiting
from nanoflow_compiler.engine.structured import (
    Grammar,
    GrammarCompiler,
    StructuredOutputsParams,
    num_mask_words,
)
from nanoflow_compiler.engine.token_mask import TokenMask

__all__ = ["Grammars"]

Ints = npt.NDArray[np.int64]

NUM_THREADS = 2
PATIENCE_S = 0.02
"""How long an engine with nothing else to do waits at a time, before it looks for new requests."""


class Grammars:
    """Requests that wait for their grammar, and the grammars of those that do not."""

    def __init__(self, make_compiler: Callable[[], GrammarCompiler], *, vocab_size: int) -> None:
        """``make_compiler`` is called once, in another thread, when the first grammar is asked for."""
        self._make_compiler = make_compiler
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Waiting, Future[Grammar]]] = {}
        self._by_key: dict[int, Grammar] = {}

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def start(self, waiting: Waiting, params: StructuredOutputsParams) -> None:
        """Compile, beside the loop, what the request needs before it can run."""
        future = self._pool.submit(self._compile, params)
        self._pending[waiting.request.key] = waiting, future

    def finished(self) -> Iterator[tuple[Waiting, Exception | None]]:
        """Requests whose grammar is ready, or why it will never be."""
        for key, (waiting, future) in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[key]
            error = future.exception()
            if isinstance(error, Exception):
                yield waiting, error
            else:
                self._by_key[key] = future.result()
                yield waiting, None

    def wait(self) -> None:
        """Until one is ready, or a moment has passed."""
        futures = [future for _, future in self._pending.values()]
        wait(futures, timeout=PATIENCE_S, return_when="FIRST_COMPLETED")

    def drop(self, keys: Iterable[int]) -> None:
        """Forget requests, whether they wait or run."""
        for key in keys:
            self._by_key.pop(key, None)
            if (pending := self._pending.pop(key, None)) is not None:
                pending[1].cancel()

    def clear(self) -> None:
        """Forget all of them."""
        self.drop([*self._pending, *self._by_key])

    def accept(self, key: int, token: int) -> bool:
        """Go on by a token; whether the text is complete. RequestError if no grammar token was left."""
        grammar = self._by_key[key]
        grammar.accept(token)
        return grammar.is_terminated

    def mask(self, rows: Ints, keys: Ints) -> TokenMask:
        """What may come next in ``rows``; a request that is gone may take any token."""
        words = np.full((len(rows), num_mask_words(self._vocab_size)), -1, dtype=np.int32)
        for row, key in zip(words, keys.tolist(), strict=True):
            if (grammar := self._by_key.get(key)) is not None:
                grammar.fill(row)
        return TokenMask(rows, words)

    def close(self) -> None:
        """Let go of the threads; what waits to be compiled is dropped."""
        self.clear()
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        with self._lock:
            compiler = self._compiler
        return compiler.compile(params)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return self._make_compiler()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="nanoflow-grammar")
