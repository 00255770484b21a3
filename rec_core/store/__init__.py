"""Ordered bytes -> bytes stores for what is computed offline and read online.

Three users share this one small interface: a behaviour tree (user, key -> behaviours), knowledge (user, condition,
as-of time -> vector) and a text table (text hash, model version -> vector). Three places hold it and answer alike:

    open_store("memory:")                                  a dictionary: tests, one process, gone with it
    open_store("/path/folder")                             LMDB, the embedded default: crash-safe, many processes
    open_store("redis://user:password@host:port/db/name")  Redis, where many machines share it (rediss:// with TLS)

`put` is one transaction: after it returns, every pair of the batch is stored (on LMDB: synced to disk); if it raises
or the process dies inside it, none is, or, where only the acknowledgement was lost, all are. Writing again is harmless.
"""

from rec_core.store.api import Store, open_store
from rec_core.store.base import FORMAT, MAX_KEY, MAX_VALUE, Entry, StoreError

__all__ = ["FORMAT", "MAX_KEY", "MAX_VALUE", "Entry", "Store", "StoreError", "open_store"]
