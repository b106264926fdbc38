"""Chunks go through three stages, several at once: while one is updated, another is fetched and a third stored.

Each worker takes the next chunk and brings it through all of its stages. A thread for each stage instead would leave processors
idle whenever the stages do not take equally long, and on a machine of few they never do.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor


def run(chunks, fetch, update, store, slots):
    """Call fetch(chunk, slot), update(chunk, slot) and store(chunk, slot) for each chunk, as many at once as there are slots.

    Chunks begin in order. A slot, one of 0 ... slots - 1, is a chunk's own from its fetch to the end of its store. The calling
    thread is a worker; the others are threads of this call, and none outlives it. If a stage raises, no further stage begins, and
    when those that run have ended the first error is raised here.

    >>> def said(stage):
    ...     return lambda chunk, slot: print(stage, chunk, slot)
    >>> run("ab", said("fetch"), said("update"), said("store"), slots=1)
    fetch a 0
    update a 0
    store a 0
    fetch b 0
    update b 0
    store b 0
    """
    chunks = list(chunks)
    left, taking = iter(chunks), threading.Lock()
    failures: list[BaseException] = []

    def work(slot):
        try:
            while not failures:
                with taking:
                    chunk = next(left, None)
                if chunk is None:
                    return
                for stage in (fetch, update, store):
                    if not failures:
                        stage(chunk, slot)
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread when the others have ended
            failures.append(error)

    pool = ThreadPoolExecutor(slots, "gpuadam chunks")
    try:
        with contextlib.suppress(RuntimeError):  # the system has no more threads, or the interpreter is ending
            for slot in range(1, min(slots, len(chunks))):
                pool.submit(work, slot)
        work(0)
        pool.shutdown()
    except BaseException as error:  # noqa: BLE001 - Ctrl-C
        failures.append(error)
    finally:
        pool.shutdown()
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # an error and its traceback are no circle then, which would keep streams and memory
