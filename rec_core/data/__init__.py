"""Data: the event-log schema, dataset readers, prepared datasets, the synthetic world, packing and pipelines.

`schema` (NumPy only) is re-exported here. The other modules are imported by name, because each owns a heavy
package: `readers` Polars, `records` ArrayRecord, `pipeline` Grain.
"""

from rec_core.data.schema import BEHAVIORS, FIRST_ITEM, PAD, UNKNOWN, DataError, EventLog, Items, Ragged, validate

__all__ = ["BEHAVIORS", "FIRST_ITEM", "PAD", "UNKNOWN", "DataError", "EventLog", "Items", "Ragged", "validate"]
